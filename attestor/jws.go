package attestor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"

	"github.com/signet-ca/signet/api"
)

const (
	maxHeaderBytes = 1 << 10 // base64url; a ServiceAccount token's is below 150
	maxKeyIDBytes  = 256
	maxTokenValues = 256 // JSON values in header or claims; a ServiceAccount token has about 25
)

// strictBase64 refuses what the usual decoder skips or ignores: newlines, padding, and stray bits in the last character.
// Otherwise one token would have several spellings.
var strictBase64 = base64.RawURLEncoding.Strict()

// compact is a JWS in its compact form (RFC 7515 section 7.1), taken apart. Nothing in it is verified.
type compact struct {
	alg     string
	kid     string
	payload []byte

	signed    []byte // header and payload as they were signed
	signature []byte
}

// parseCompact takes apart what must be exactly one token. It spends nothing on what is too large, and allocates no more
// than a small multiple of api.MaxTokenBytes on the rest.
func parseCompact(data []byte) (*compact, error) {
	if err := checkShape(data); err != nil {
		return nil, err
	}
	header, rest, _ := bytes.Cut(data, dot)
	payload, signature, _ := bytes.Cut(rest, dot)
	c := &compact{signed: data[:len(data)-len(signature)-1]}
	if len(header) > maxHeaderBytes {
		return nil, api.E(api.TokenMalformed, "the token's header is above %d bytes", maxHeaderBytes)
	}
	h, err := strictBase64.AppendDecode(nil, header)
	if err != nil {
		return nil, errSegment("header")
	}
	if c.payload, err = strictBase64.AppendDecode(nil, payload); err != nil {
		return nil, errSegment("payload")
	}
	if c.signature, err = strictBase64.AppendDecode(nil, signature); err != nil {
		return nil, errSegment("signature")
	}
	return c, c.readHeader(h)
}

var dot = []byte{'.'}

func errSegment(name string) error {
	return api.E(api.TokenMalformed, "the token's %s is not base64url", name)
}

// checkSize refuses what is no token, or more than one may have.
func checkSize(data []byte) error {
	switch {
	case len(data) == 0:
		return api.E(api.TokenMissing, "there is no token")
	case len(data) > api.MaxTokenBytes:
		return api.E(api.TokenTooLarge, "the token is above %d bytes", api.MaxTokenBytes)
	}
	return nil
}

// checkShape tells by its bytes alone whether data is three base64url strings with dots between them.
func checkShape(data []byte) error {
	if err := checkSize(data); err != nil {
		return err
	}
	dots, last := 0, byte('.')
	for _, b := range data {
		switch {
		case isBase64URL(b): // nearly all
		case b == '.':
			if dots++; last == '.' || dots > 2 {
				return errShape()
			}
		case separates(b):
			return errAmbiguous()
		default:
			return errShape()
		}
		last = b
	}
	if dots != 2 || last == '.' {
		return errShape()
	}
	return nil
}

// separates reports whether b, in text that should be one token, would end it for some reader of headers or files.
func separates(b byte) bool { return b <= ' ' || b == ',' || b == 0x7f }

func errAmbiguous() error {
	return api.E(api.TokenAmbiguous, "there is more than one token, or something beside it")
}

func errShape() error { return api.E(api.TokenMalformed, "the token is not a compact JWT") }

func isBase64URL(b byte) bool { return base64URL[b] }

// base64URL has the characters of RFC 4648 section 5. Every byte of every token is looked up in it.
var base64URL = func() (is [256]bool) {
	for _, b := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") {
		is[b] = true
	}
	return is
}()

// readHeader honours alg, kid and typ. Any other member is refused, whether it is known to be dangerous (jwk, jku, x5u,
// crit, b64) or not: it says something about the signature that would not be heeded.
func (c *compact) readHeader(header []byte) error {
	m, err := parseObject(header, maxTokenValues)
	if err != nil {
		return api.E(api.TokenMalformed, "the token's header is %s", err)
	}
	for name := range m {
		if name != "alg" && name != "kid" && name != "typ" {
			return api.E(api.TokenSignature, "the token's header has members besides alg, kid and typ")
		}
	}
	if c.alg, _ = m["alg"].(string); !slices.Contains(algorithms, c.alg) {
		return api.E(api.TokenSignature, "the token's algorithm is not one an issuer may use")
	}
	if c.kid, _ = m["kid"].(string); c.kid == "" || len(c.kid) > maxKeyIDBytes {
		return api.E(api.TokenSignature, "the token does not name its key")
	}
	if typ, ok := m["typ"]; ok && typ != "JWT" && typ != "JOSE" {
		return api.E(api.TokenMalformed, "the token's typ is not JWT")
	}
	return nil
}

// verify checks the signature with the one key of the set that bears the token's kid and may be used with its algorithm.
func (c *compact) verify(ctx context.Context, keys Keys) error {
	key, err := keys.Lookup(ctx, c.kid, c.alg)
	if err != nil {
		return err
	}
	if !verify(key, c.alg, c.signed, c.signature) {
		return errSignature()
	}
	return nil
}

func errSignature() error {
	return api.E(api.TokenSignature, "no key of the issuer verifies the token")
}

// hash names the token where its issuer did not. It leaves the signature out: an ECDSA signature has a second form that
// anyone can derive, and one token must have one name.
func (c *compact) hash() string {
	sum := sha256.Sum256(c.signed)
	return "sha256:" + hex.EncodeToString(sum[:])
}
