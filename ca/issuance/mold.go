package issuance

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
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
	id  asn1.ObjectIdentifier
	der []byte // whole; nil where each leaf has its own
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
		var whole, inner cryptobyte.String
		var e extensionOf
		if !list.ReadASN1Element(&whole, cbasn1.SEQUENCE) {
			return nil, errMold
		}
		e.der = whole
		if !whole.ReadASN1(&inner, cbasn1.SEQUENCE) || !inner.ReadASN1ObjectIdentifier(&e.id) {
			return nil, errMold
		}
		if e.id.Equal(oidSubjectKeyID) || e.id.Equal(oidSubjectAltName) {
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

// ofEveryLeaf sets what no request and no profile changes. The subject stays empty, which makes the subjectAltName critical.
func ofEveryLeaf(template *x509.Certificate) {
	template.Subject = pkix.Name{}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	template.BasicConstraintsValid = true // and not an authority
}

// cast makes the leaf that template and spki, the DER of its SubjectPublicKeyInfo, say. Of the template it takes what differs
// between leaves: serial number, times, key identifier, DNS names and the one URI.
func (m *mold) cast(template *x509.Certificate, spki []byte) (*unsigned, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, moldBytes))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(m.version)
		b.AddASN1BigInt(template.SerialNumber)
		b.AddBytes(m.algorithm)
		b.AddBytes(m.issuer)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, template.NotBefore)
			addTime(b, template.NotAfter)
		})
		b.AddASN1(cbasn1.SEQUENCE, func(*cryptobyte.Builder) {}) // subject
		b.AddBytes(spki)
		b.AddASN1(cbasn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				for _, e := range m.extensions {
					e.add(b, template)
				}
			})
		})
	})
	tbs, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encoding a certificate: %w", err)
	}
	u := &unsigned{tbs: tbs, algorithm: m.signature, opts: m.opts}
	u.preview, err = u.with([]byte{0})
	return u, err
}

// add adds an extension (RFC 5280 section 4.1.2.9).
func (e extensionOf) add(b *cryptobyte.Builder, template *x509.Certificate) {
	if e.der != nil {
		b.AddBytes(e.der)
		return
	}
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(e.id)
		if e.id.Equal(oidSubjectAltName) {
			b.AddASN1Boolean(true) // critical
		}
		b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) {
			if e.id.Equal(oidSubjectKeyID) {
				b.AddASN1OctetString(template.SubjectKeyId)
				return
			}
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				for _, name := range template.DNSNames {
					b.AddASN1(cbasn1.Tag(nameDNS).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
				}
				for _, uri := range template.URIs {
					b.AddASN1(cbasn1.Tag(nameURI).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(uri.String())) })
				}
			})
		})
	})
}

// addTime adds a Time as RFC 5280 section 4.1.2.5 wants it: of two digits for the year until 2049, of four from 2050 on.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}
