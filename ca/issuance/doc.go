// Package issuance makes certificates: a profile, a request and a time become one X.509-SVID, and keys become roots and
// intermediates. It is pure: no clock, no I/O, no context, no state but what a signing key holds; its only input from
// the outside is randomness.
//
// Whatever is in a certificate is decided here, from arguments that the CA made itself. Of a certificate request nothing
// gets through but its public key: names, lifetime and usage in it are compared or refused, never copied. So what an
// SVID can be is readable in one place, apart from everything that talks to those who want one.
//
// A leaf is made in two steps, so that what is about to be signed can be put on record first:
//
//  1. Prepare builds the to-be-signed form and checks it against every rule. The issuing key is out of its reach.
//  2. Prepared.Sign signs exactly those bytes, once, and checks the outcome before anybody sees it.
//
// The rules themselves are lists, in lints.go and lints_authority.go; each names the text it comes from, or "Signet profile"
// where we ask for more than the specifications do.
package issuance
