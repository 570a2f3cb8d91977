// Package envoy runs real Envoys whose certificates and trust bundles come from a Signet agent: it writes their
// bootstraps, starts and kills their processes, asks their admin interface, and holds a small SDS client that takes the
// same secrets as they do.
//
// It is shared by `signet demo` and by the integration tests, so that what people are shown is what is tested. A
// bootstrap that it writes is safe by its shape: TLS 1.3 only, a client certificate is required, peers are matched by
// their exact SPIFFE IDs on top of the trust bundle's own validator, TLS sessions are never resumed (a resumed session
// skips the check against the current bundle), and nothing starts before the certificate and the bundle are there. No
// value can change the document's shape: each is written as a quoted string. Everything listens on loopback.
package envoy
