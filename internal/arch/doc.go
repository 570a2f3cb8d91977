// Package arch holds the tests of the house itself: which package may import which, what each binary links, what must be
// documented, how large things may grow, and which rules of the SPIFFE specifications are proven by which tests.
//
// The security of the whole leans on its shape: the agent runs on every node and must not contain the code that signs;
// packages that decide must not reach the network. A shape that is only agreed on erodes, so a new arrow between two
// packages is a change of the table here, made on purpose and seen in review.
package arch
