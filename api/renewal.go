package api

import (
	"crypto/sha256"
	"encoding/binary"
)

// Bounds of what proves a known renewal. They hold before anything of it is parsed.
const (
	MaxTicketBytes     = 1 << 10
	MaxHeldChainBytes  = 16 << 10 // DER of all certificates
	MaxPossessionBytes = 1 << 10  // a signature
)

// renewalDomain keeps a signature that is made here from being one of anything else.
const renewalDomain = "signet known renewal v1\x00"

// RenewalDigest is what the key of a held SVID signs to have it renewed while no API server can vouch for its workload: it
// names the ticket of that SVID and the request with the new key, so it can neither be moved to another ticket nor to
// another key. What is signed is this digest: ECDSA (ASN.1) or RSA PKCS #1 v1.5 with SHA-256 as its hash, or as the message
// of Ed25519.
func RenewalDigest(ticket, csr []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write([]byte(renewalDomain))
	for _, part := range [][]byte{ticket, csr} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		h.Write(part)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
