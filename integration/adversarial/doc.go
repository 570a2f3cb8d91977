// Package adversarial asks the CA, and SDS, for what nobody may have, over real gRPC: tokens that were changed in every
// place, certificate requests broken at every byte that has a meaning, names that Kubernetes would never give, streams that
// break the protocol.
//
// The variants are made by code, not kept in files, so that a new claim or field is attacked as all others are. Each knows
// which reasons are right for it, and each is judged alike: a reason of the closed table and nothing internal, a
// correlation id, nothing issued by ledger and by metric, no word of token, request or neighbour in the answer or in the
// log. One that is accepted must lead to the very SVID that the untouched request leads to.
package adversarial
