package ca

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

// A renewal ticket goes with each SVID. It says, under a key in the record, for whom exactly that SVID was issued: which
// pod, ServiceAccount, node and volume, on which token, with which key. It is asked for only while no API server can
// vouch for the workload, so whatever was decided then any replica knows by it, and it gives nothing by itself: it is as
// public as the certificate.
//
// Its form, of fixed size so that there is nothing to parse:
//
//	version 1, key id 8, kind 1, the SVID's NotAfter 8, the token's iat 8 (both big-endian Unix seconds),
//	one SHA-256 for each of ticketParts, HMAC-SHA256 of all that stands before 32
const (
	ticketV1        = 1
	ticketKeyID     = 8
	ticketHeadBytes = 1 + ticketKeyID
	ticketBodyBytes = 1 + 8 + 8 + ticketParts*sha256.Size
	ticketBytes     = ticketHeadBytes + ticketBodyBytes + sha256.Size
)

// ticketDomain keeps the MAC of a ticket from being one of anything else under the same key.
const ticketDomain = "signet renewal ticket\x00"

// A ticketKind says what the SVID of a ticket is for.
type ticketKind byte

// The kinds.
const (
	ticketWorkload ticketKind = 1
	ticketAgent    ticketKind = 2
)

// What a ticket names by its hash: as long as all values are found where they must be, their hashes are enough.
const (
	partID      = iota // the SPIFFE ID
	partIssuer         // of the cluster's tokens
	partPod            // its UID
	partAccount        // UID of its ServiceAccount
	partNode           // UID of its node
	partToken          // its jti
	partVolume
	partKey    // the SVID's SubjectPublicKeyInfo
	partSerial // the SVID's serial
	ticketParts
)

// partNames are for refusals.
var partNames = [ticketParts]string{
	"SPIFFE ID", "cluster", "pod", "ServiceAccount", "node", "token", "volume", "key", "certificate",
}

// ticket is what a renewal ticket says.
type ticket struct {
	kind     ticketKind
	notAfter int64 // of the SVID
	tokenAt  int64 // when the token was issued
	parts    [ticketParts][sha256.Size]byte
}

// ticketOf is the ticket of an SVID, leaf, that is issued to c for a volume.
func ticketOf(kind ticketKind, c attestor.Claims, volume string, leaf *x509.Certificate) ticket {
	t := ticket{kind: kind, notAfter: leaf.NotAfter.Unix(), tokenAt: c.IssuedAt.Unix()}
	id := ""
	if len(leaf.URIs) == 1 {
		id = leaf.URIs[0].String()
	}
	for part, value := range [ticketParts]string{
		partID: id, partIssuer: c.Issuer, partPod: c.PodUID, partAccount: c.ServiceAccountUID, partNode: c.NodeUID, partToken: c.TokenID,
		partVolume: volume, partKey: string(leaf.RawSubjectPublicKeyInfo), partSerial: string(leaf.SerialNumber.Bytes()),
	} {
		t.parts[part] = sha256.Sum256([]byte(value))
	}
	return t
}

// admits reports whether what is shown now, as a ticket of its own, may be renewed by t: everything must be the same, but
// that a later token of that very pod is as good as the one that the SVID was issued on. Tokens are of whole seconds, and
// kubelet may bring two in one. A pod that shows tokens both by a volume and by the shared socket has another volume with
// another token; each token keeps its own (memory.bindToken). TicketMismatch says what differs.
func (t ticket) admits(shown ticket) error {
	if t.kind != shown.kind {
		return api.E(api.TicketMismatch, "the ticket is for another kind of identity")
	}
	later := t.parts[partToken] != shown.parts[partToken] && shown.tokenAt >= t.tokenAt
	for part := range ticketParts {
		if t.parts[part] == shown.parts[part] || later && (part == partToken || part == partVolume) {
			continue
		}
		return api.E(api.TicketMismatch, "the ticket belongs to another %s", partNames[part])
	}
	if t.notAfter != shown.notAfter {
		return api.E(api.TicketMismatch, "the ticket belongs to another %s", partNames[partSerial])
	}
	return nil
}

// ticketKey is one key of tickets, opened.
type ticketKey struct {
	id  [ticketKeyID]byte
	at  time.Time
	key []byte
}

func (k ticketKey) mac(ticket []byte) []byte {
	h := hmac.New(sha256.New, k.key)
	h.Write([]byte(ticketDomain))
	h.Write(ticket)
	return h.Sum(nil)
}

// seal encodes and authenticates t.
func (k ticketKey) seal(t ticket) []byte {
	b := make([]byte, 0, ticketBytes)
	b = append(append(b, ticketV1), k.id[:]...)
	b = append(b, byte(t.kind))
	b = binary.BigEndian.AppendUint64(b, uint64(t.notAfter))
	b = binary.BigEndian.AppendUint64(b, uint64(t.tokenAt))
	for _, p := range t.parts {
		b = append(b, p[:]...)
	}
	return append(b, k.mac(b)...)
}

// ticketKeys are those of the record, newest first. They are never changed once made.
type ticketKeys []ticketKey

// seal makes a ticket under the newest key; nil where there is none.
func (ks ticketKeys) seal(t ticket) []byte {
	if len(ks) == 0 {
		return nil
	}
	return ks[0].seal(t)
}

// open returns what a ticket says that was made under one of the keys; TicketInvalid for anything else. Nothing of it is
// looked at before its MAC is known to be good, but which key it names.
func (ks ticketKeys) open(b []byte) (ticket, error) {
	if len(b) != ticketBytes || b[0] != ticketV1 {
		return ticket{}, api.E(api.TicketInvalid, "the ticket is not of a form that this CA makes")
	}
	for _, k := range ks {
		if !bytes.Equal(k.id[:], b[1:ticketHeadBytes]) {
			continue
		}
		covered, mac := b[:ticketBytes-sha256.Size], b[ticketBytes-sha256.Size:]
		if !hmac.Equal(k.mac(covered), mac) {
			return ticket{}, api.E(api.TicketInvalid, "the ticket was changed, or made by somebody else")
		}
		return decodeTicket(covered[ticketHeadBytes:]), nil
	}
	return ticket{}, api.E(api.TicketInvalid, "the ticket was made under a key that the record does not have")
}

// decodeTicket reads ticketBodyBytes that were authenticated.
func decodeTicket(b []byte) ticket {
	t := ticket{
		kind:     ticketKind(b[0]),
		notAfter: int64(binary.BigEndian.Uint64(b[1:])),
		tokenAt:  int64(binary.BigEndian.Uint64(b[9:])),
	}
	for i := range t.parts {
		t.parts[i] = [sha256.Size]byte(b[17+i*sha256.Size:])
	}
	return t
}
