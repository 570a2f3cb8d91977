// Package api is the vocabulary of Signet: what crosses the wire between its parts, and what every part calls by the
// same name. It holds the closed table of reasons for which a request is refused, the error that carries one across
// gRPC, and the few names (audiences, reserved SPIFFE IDs, the hash of a bundle) on which all sides must agree.
package api
