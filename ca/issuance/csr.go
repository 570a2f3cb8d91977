package issuance

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// A CSR is what is taken from a certificate request: a key whose possession is proven, and nothing else. The name that
// the request may carry can only be compared; its subject was never looked at.
type CSR struct {
	PublicKey crypto.PublicKey
	SPKI      [sha256.Size]byte // SHA-256 of the DER of the SubjectPublicKeyInfo

	uri string // of the subjectAltName; empty when the request names nothing
}

// Match reports whether the request may be answered with an SVID for id: it names nothing, or exactly id, byte for byte.
// Anything else is api.IDMismatch.
func (c *CSR) Match(id spiffeid.ID) error {
	if c.uri != "" && c.uri != id.String() {
		return api.E(api.IDMismatch, "the request names another identity than the one that was attested")
	}
	return nil
}

// ParseCSR reads a PKCS#10 request (RFC 2986, DER) and checks it, cheapest question first; the signature, which costs the
// most, is last. The request is refused, with an *api.Error, for
//
//   - its size (api.CSRTooLarge) or for not being exactly one request in DER (api.CSRMalformed);
//   - its key (see CheckKey);
//   - an attribute or extension other than one subjectAltName (api.CSRForbiddenExtension);
//   - any name but one URI (api.CSRExtraSAN, api.CSRURICount) that is the SPIFFE ID of a workload (api.IDMalformed);
//   - a signature that is not by its own key or is by a broken algorithm (api.CSRSignature).
//
// Neither the errors nor the CSR hold anything of the subject.
func ParseCSR(der []byte, allowed Keys) (*CSR, error) {
	if len(der) > api.MaxCSRBytes {
		return nil, api.E(api.CSRTooLarge, "the request has %d bytes, at most %d are read", len(der), api.MaxCSRBytes)
	}
	r, err := splitRequest(der)
	if err != nil {
		return nil, api.E(api.CSRMalformed, "the request is not exactly one PKCS#10 request in DER")
	}
	pub, err := parseRequestKey(r.spki, allowed)
	if err != nil {
		return nil, err
	}
	uri, err := requestedURI(r.attributes)
	if err != nil {
		return nil, err
	}
	if err := checkPossession(pub, r.algorithm.FullBytes, r.info.FullBytes, r.signature); err != nil {
		return nil, err
	}
	return &CSR{PublicKey: pub, SPKI: sha256.Sum256(r.spki.FullBytes), uri: uri}, nil
}

// checkPossession verifies the signature of a request by its own key. identifier is the DER of its AlgorithmIdentifier.
func checkPossession(pub crypto.PublicKey, identifier, info, signature []byte) error {
	algorithm, ok := requestSignatures()[string(identifier)]
	if !ok {
		return api.E(api.CSRSignature, "the request is signed with an algorithm that is not accepted")
	}
	signed := x509.CertificateRequest{
		PublicKey:                pub,
		SignatureAlgorithm:       algorithm,
		RawTBSCertificateRequest: info,
		Signature:                signature,
	}
	if err := signed.CheckSignature(); err != nil {
		return api.Wrap(api.CSRSignature, err, "the request is not signed by the key that it contains")
	}
	return nil
}

// request holds the parts of a PKCS#10 request; spki and attributes are inside info.
type request struct {
	info       asn1.RawValue // what is signed
	spki       asn1.RawValue
	attributes []byte // the elements of the SET
	algorithm  asn1.RawValue
	signature  []byte
}

// splitRequest takes a request apart (RFC 2986 section 4). The subject is skipped as the one element that it is.
func splitRequest(der []byte) (request, error) {
	outer, err := element(der)
	if err != nil {
		return request{}, err
	}
	parts, err := fields(outer, 3, 3)
	if err != nil {
		return request{}, err
	}
	info, err := fields(parts[0], 4, 4)
	if err != nil {
		return request{}, err
	}
	version, subject, spki, attributes := info[0], info[1], info[2], info[3]
	if !bytes.Equal(version.FullBytes, []byte{asn1.TagInteger, 1, 0}) || !isUniversal(subject, asn1.TagSequence) ||
		!isUniversal(spki, asn1.TagSequence) || !isContext(attributes, 0, true) ||
		!isUniversal(parts[1], asn1.TagSequence) || !isUniversal(parts[2], asn1.TagBitString) {
		return request{}, errDER
	}
	bits := parts[2].Bytes
	if len(bits) == 0 || bits[0] != 0 { // signatures are whole bytes
		return request{}, errDER
	}
	return request{parts[0], spki, attributes.Bytes, parts[1], bits[1:]}, nil
}

// parseRequestKey reads a SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7) of an accepted type, in its one DER form, so
// that one key has one hash.
func parseRequestKey(spki asn1.RawValue, allowed Keys) (crypto.PublicKey, error) {
	malformed := api.E(api.CSRMalformed, "the request's key does not parse")
	info, err := fields(spki, 2, 2)
	if err != nil || !isUniversal(info[0], asn1.TagSequence) {
		return nil, malformed
	}
	kind, ok := keyAlgorithms()[string(info[0].FullBytes)]
	if !ok {
		return nil, api.E(api.KeyType, "keys of this type or with these parameters are not accepted")
	}
	pub, err := decodeKey(spki.FullBytes)
	if err != nil && kind == x509.ECDSA {
		return nil, api.E(api.WeakKey, "the key is not an uncompressed point on its curve")
	}
	if err != nil {
		return nil, malformed
	}
	if err := CheckKey(pub, allowed); err != nil {
		return nil, err
	}
	if again, err := encodeKey(pub); err != nil || !bytes.Equal(again, spki.FullBytes) {
		return nil, malformed
	}
	return pub, nil
}

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17} // RFC 5280 section 4.2.1.6

	derExtensionRequest = encode(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}) // RFC 2985 section 5.4.2
	derSubjectAltName   = encode(oidSubjectAltName)
)

// requestedURI returns the one URI that a request may name, or "". Nothing else may be asked for.
func requestedURI(attributes []byte) (string, error) {
	san, err := requestedSAN(attributes)
	if err != nil || san == nil {
		return "", err
	}
	uri, count := "", 0
	for name, err := range generalNames(san) {
		switch {
		case err != nil:
			return "", api.E(api.CSRMalformed, "the request's subject alternative name does not parse")
		case !isContext(name, nameURI, false):
			return "", api.E(api.CSRExtraSAN, "the request asks for a name that is not a URI")
		}
		if count++; count > 1 {
			return "", api.E(api.CSRURICount, "the request has more than one URI")
		}
		uri = string(name.Bytes)
	}
	if count == 0 {
		return "", api.E(api.CSRMalformed, "the request's subject alternative name is empty")
	}
	if _, err := api.ParseWorkloadID(uri); err != nil {
		return "", api.E(api.IDMalformed, "the request's URI is not the SPIFFE ID of a workload in canonical form")
	}
	return uri, nil
}

// requestedSAN returns the value of the subjectAltName extension among the attributes of a request, nil where there is
// none.
func requestedSAN(attributes []byte) ([]byte, error) {
	malformed := api.E(api.CSRMalformed, "the request's attributes do not parse")
	var seen bool
	var san []byte
	for v, err := range elements(attributes) {
		if err != nil {
			return nil, malformed
		}
		attribute, err := fields(v, 2, 2)
		if err != nil || !isUniversal(attribute[1], asn1.TagSet) {
			return nil, malformed
		}
		if !bytes.Equal(attribute[0].FullBytes, derExtensionRequest) {
			return nil, api.E(api.CSRForbiddenExtension, "the request has an attribute other than a list of extensions")
		}
		list, err := element(attribute[1].Bytes)
		if err != nil || seen || !isUniversal(list, asn1.TagSequence) {
			return nil, malformed
		}
		seen = true
		for v, err := range elements(list.Bytes) {
			if err != nil {
				return nil, malformed
			}
			value, err := sanExtension(v)
			if errors.Is(err, errOtherExtension) {
				return nil, api.E(api.CSRForbiddenExtension, "the request asks for an extension other than a subject alternative name")
			}
			if err != nil || san != nil {
				return nil, malformed
			}
			san = value
		}
	}
	return san, nil
}

var errOtherExtension = errors.New("not a subjectAltName")

// sanExtension returns the value of an Extension (RFC 5280 section 4.1) that is a subjectAltName, critical or not.
func sanExtension(v asn1.RawValue) ([]byte, error) {
	ext, err := fields(v, 2, 3)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(ext[0].FullBytes, derSubjectAltName) {
		return nil, errOtherExtension
	}
	if len(ext) == 3 && !bytes.Equal(ext[1].FullBytes, []byte{asn1.TagBoolean, 1, 0xff}) {
		return nil, errDER
	}
	value := ext[len(ext)-1]
	if !isUniversal(value, asn1.TagOctetString) || len(value.Bytes) == 0 {
		return nil, errDER
	}
	return value.Bytes, nil
}
