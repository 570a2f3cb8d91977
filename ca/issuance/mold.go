package issuance

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// mold is what all leaves of one issuer have in common, as crypto/x509 encodes it. A leaf is made by putting serial number,
// times, key, key identifier and names into it, which costs a tenth of encoding it anew; the bytes are the same, and what comes
// out is parsed and checked like any certificate before it is signed.
type mold struct {
	version, algorithm, issuer []byte            // DER of these fields of a TBSCertificate (RFC 5280 section 4.1)
	signature                  asn1.RawValue     // algorithm, once more
	opts                       crypto.SignerOpts // how a signer is asked for the signature
	extensions                 []extensionOf     // in the encoder's order
}

// extensionOf is one extension of a mold.
type extensionOf struct {
	der []byte // whole; nil where each leaf has its own
	id  []byte // DER of its object identifier
	san bool   // of those that are each leaf's own: names, or else the key identifier
}

// cast is what differs between leaves of one issuer.
type cast struct {
	serial              [serialBytes]byte
	notBefore, notAfter time.Time
	spki                []byte // DER of the SubjectPublicKeyInfo
	keyID               []byte
	dnsNames            []string
	uri                 string
}

// moldBytes is room for most leaves.
const moldBytes = 640

var errMold = errors.New("a leaf is not encoded as it should be")

// newMold takes a mold from a leaf that is never signed: of the issuer's own key, with a name that is no workload's.
func newMold(parent *x509.Certificate) (*mold, error) {
	template := &x509.Certificate{
		SerialNumber: newSerial(), NotBefore: parent.NotBefore, NotAfter: parent.NotAfter, URIs: []*url.URL{{Scheme: "spiffe", Host: "mold"}},
		SubjectKeyId: make([]byte, keyIDBytes),
	}
	ofEveryLeaf(template)
	u, err := build(template, parent, parent.PublicKey, parent.PublicKey)
	if err != nil {
		return nil, err
	}
	m := &mold{signature: u.algorithm, opts: u.opts}
	tbs, all := cryptobyte.String(u.tbs), cryptobyte.String(nil)
	var version, algorithm, issuer, extensions, list cryptobyte.String
	if !tbs.ReadASN1(&all, cbasn1.SEQUENCE) || !tbs.Empty() ||
		!all.ReadASN1Element(&version, cbasn1.Tag(0).ContextSpecific().Constructed()) || !all.SkipASN1(cbasn1.INTEGER) ||
		!all.ReadASN1Element(&algorithm, cbasn1.SEQUENCE) || !all.ReadASN1Element(&issuer, cbasn1.SEQUENCE) ||
		!all.SkipASN1(cbasn1.SEQUENCE) || !all.SkipASN1(cbasn1.SEQUENCE) || !all.SkipASN1(cbasn1.SEQUENCE) || // validity, subject, key
		!all.ReadASN1(&extensions, cbasn1.Tag(3).ContextSpecific().Constructed()) || !all.Empty() ||
		!extensions.ReadASN1(&list, cbasn1.SEQUENCE) || !extensions.Empty() {
		return nil, errMold
	}
	m.version, m.algorithm, m.issuer = version, algorithm, issuer
	own := 0
	for !list.Empty() {
		var whole, inner, id cryptobyte.String
		var e extensionOf
		if !list.ReadASN1Element(&whole, cbasn1.SEQUENCE) {
			return nil, errMold
		}
		e.der = whole
		if !whole.ReadASN1(&inner, cbasn1.SEQUENCE) || !inner.ReadASN1Element(&id, cbasn1.OBJECT_IDENTIFIER) {
			return nil, errMold
		}
		e.id = id
		if e.san = string(id) == string(derSubjectAltName); e.san || string(id) == string(derSubjectKeyID) {
			e.der = nil
			own++
		}
		m.extensions = append(m.extensions, e)
	}
	if own != 2 {
		return nil, errMold
	}
	return m, nil
}

var derSubjectKeyID = encode(oidSubjectKeyID)

// ofEveryLeaf sets what no request and no profile changes. The subject stays empty, which makes the subjectAltName critical.
func ofEveryLeaf(template *x509.Certificate) {
	template.Subject = pkix.Name{}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	template.BasicConstraintsValid = true // and not an authority
}

// pour makes the leaf that c says.
func (m *mold) pour(c *cast) (*unsigned, error) {
	from, err := encodeTime(c.notBefore)
	if err != nil {
		return nil, err
	}
	to, err := encodeTime(c.notAfter)
	if err != nil {
		return nil, err
	}
	w := newBackwards(moldBytes)
	for _, e := range slices.Backward(m.extensions) {
		e.add(w, c)
	}
	w.wrap(cbasn1.SEQUENCE, 0)
	w.wrap(cbasn1.Tag(3).ContextSpecific().Constructed(), 0)
	w.put(c.spki)
	w.wrap(cbasn1.SEQUENCE, w.len()) // the subject, which is empty
	end := w.len()
	w.put(to)
	w.put(from)
	w.wrap(cbasn1.SEQUENCE, end)
	w.put(m.issuer)
	w.put(m.algorithm)
	end = w.len()
	w.put(c.serial[:])
	w.wrap(cbasn1.INTEGER, end) // drawSerial leaves nothing to shorten, and no sign
	w.put(m.version)
	w.wrap(cbasn1.SEQUENCE, 0)
	u := &unsigned{tbs: w.bytes(), algorithm: m.signature, opts: m.opts}
	u.preview, err = u.with([]byte{0})
	return u, err
}

// add adds an extension (RFC 5280 section 4.1.2.9).
func (e *extensionOf) add(w *backwards, c *cast) {
	if e.der != nil {
		w.put(e.der)
		return
	}
	end := w.len()
	if e.san {
		w.putString(c.uri)
		w.wrap(cbasn1.Tag(nameURI).ContextSpecific(), end)
		for _, name := range slices.Backward(c.dnsNames) {
			end := w.len()
			w.putString(name)
			w.wrap(cbasn1.Tag(nameDNS).ContextSpecific(), end)
		}
		w.wrap(cbasn1.SEQUENCE, end)
		w.wrap(cbasn1.OCTET_STRING, end)
		w.put([]byte{asn1.TagBoolean, 1, 0xff}) // critical
	} else {
		w.put(c.keyID)
		w.wrap(cbasn1.OCTET_STRING, end)
		w.wrap(cbasn1.OCTET_STRING, end)
	}
	w.put(e.id)
	w.wrap(cbasn1.SEQUENCE, end)
}

// encodeTime is the DER of a Time as RFC 5280 section 4.1.2.5 wants it: of two digits for the year until 2049, of four from
// 2050 on.
func encodeTime(t time.Time) ([]byte, error) {
	t = t.UTC()
	switch y := t.Year(); {
	case y < 1950 || y > 9999:
		return nil, fmt.Errorf("%w: a time in the year %d", errMold, y)
	case y < 2050:
		return t.AppendFormat(append(make([]byte, 0, 16), asn1.TagUTCTime, 13), "060102150405Z"), nil
	default:
		return t.AppendFormat(append(make([]byte, 0, 20), asn1.TagGeneralizedTime, 15), "20060102150405Z"), nil
	}
}
