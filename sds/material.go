package sds

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/api"
)

// TypeURL is the type of every resource here, and the only one that is served.
const TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// spiffeValidator is the name by which Envoy finds its SPIFFE certificate validator.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// An encoded is one secret under one name as it crosses the wire. It is made once, shared by all streams, and never
// changed: marshalling it concurrently is safe.
type encoded struct {
	stamp
	trust    bool                // a bundle, not an identity
	resource *discovery.Resource // name, version, and the secret with its bytes
}

// kind is what hooks call the secret.
func (e *encoded) kind() string {
	if e.trust {
		return "trust"
	}
	return "identity"
}

// A stamp tells which content an encoded secret has, without holding it: what a stream remembers of it.
type stamp struct {
	digest     string // 32 hex digits over the certificates alone: equal digests are equal secrets
	serial     string // of an identity, lower-case hex
	generation uint64 // of the own trust domain's bundle
	hash       [sha256.Size]byte
}

// An Identity is an X509-SVID and its key in the form that Envoy takes: encoded once, shared by all streams.
type Identity struct {
	id        spiffeid.ID
	notAfter  time.Time
	word, uri *encoded // as "default", and as its SPIFFE ID
}

// ID returns the SPIFFE ID of the identity.
func (i *Identity) ID() spiffeid.ID { return i.id }

// Serial returns the serial number of its certificate in lower-case hex, two digits a byte, as reports name it.
func (i *Identity) Serial() string { return i.word.serial }

// NewIdentity encodes svid. It refuses with SVIDRejected what must never reach a proxy: what is not an X509-SVID of
// svid.ID (SPIFFE X509-SVID sections 2 to 5), a key that is not the leaf's or cannot be exported, a chain that is out
// of order or has a self-signed certificate in it. It does not check the chain against a bundle, nor the time.
func NewIdentity(svid *x509svid.SVID) (*Identity, error) {
	certs, key, err := checkSVID(svid)
	if err != nil {
		return nil, err
	}
	serial := hex.EncodeToString(certs[0].SerialNumber.Bytes())
	st := stamp{digest: digest(certs), serial: serial}
	content := &tls.Secret{Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
		CertificateChain: inline(encodePEM(certs)),
		PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	}}}
	word, err := encode(NameDefault, serial, st, content)
	if err != nil {
		return nil, api.Wrap(api.SVIDRejected, err, "the SVID cannot be encoded")
	}
	uri, err := encode(svid.ID.String(), serial, st, content)
	if err != nil {
		return nil, api.Wrap(api.SVIDRejected, err, "the SVID cannot be encoded")
	}
	return &Identity{id: svid.ID, notAfter: certs[0].NotAfter, word: word, uri: uri}, nil
}

// checkSVID returns the chain, leaf first, and the key in PKCS#8.
func checkSVID(svid *x509svid.SVID) (certs []*x509.Certificate, key []byte, err error) {
	if svid == nil || len(svid.Certificates) == 0 || svid.PrivateKey == nil {
		return nil, nil, api.E(api.SVIDRejected, "the SVID has no certificate or no key")
	}
	chain, key, err := svid.MarshalRaw()
	if err != nil {
		return nil, nil, api.Wrap(api.SVIDRejected, err, "the private key cannot be exported")
	}
	// Parsing checks the leaf's names, usages and path, that the rest are authorities, and that the key is the leaf's.
	parsed, err := x509svid.ParseRaw(chain, key)
	if err != nil {
		return nil, nil, api.Wrap(api.SVIDRejected, err, "the certificate is not an X509-SVID for this key")
	}
	if parsed.ID != svid.ID {
		return nil, nil, api.E(api.SVIDRejected, "the certificate has another SPIFFE ID than the SVID")
	}
	if len(svid.ID.String()) > api.MaxIDBytes {
		return nil, nil, api.E(api.SVIDRejected, "the SPIFFE ID is longer than %d bytes", api.MaxIDBytes)
	}
	certs = parsed.Certificates
	for i, c := range certs {
		if bytes.Equal(c.RawSubject, c.RawIssuer) && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
			return nil, nil, api.E(api.SVIDRejected, "a self-signed certificate is in the chain")
		}
		if i > 0 && certs[i-1].CheckSignatureFrom(c) != nil {
			return nil, nil, api.E(api.SVIDRejected, "the chain is not in order: certificate %d did not issue the one before", i)
		}
	}
	return certs, key, nil
}

// Trust is what a workload may believe: the bundle of its own trust domain and those of others, encoded once and shared
// by all streams and workloads of a node.
type Trust struct {
	td             spiffeid.TrustDomain
	word, uri, all *encoded // as ROOTCA, as the trust domain's ID, and as ALL
}

// TrustDomain returns the own trust domain.
func (t *Trust) TrustDomain() spiffeid.TrustDomain { return t.td }

// Generation returns the spiffe_sequence of the own bundle, as it was given to NewTrust.
func (t *Trust) Generation() uint64 { return t.word.generation }

// Hash returns the api.BundleHash of the own bundle.
func (t *Trust) Hash() [sha256.Size]byte { return t.word.hash }

// NewTrust encodes the bundle of the own trust domain, whose spiffe_sequence is generation, and the bundles of other
// trust domains. It computes the hash that acknowledgements are held against from own itself, so that what is
// acknowledged is what was pushed.
//
// It refuses with BundleRejected an own bundle without authorities (an empty validator would be no validator), an
// authority that is not one, and two bundles of one trust domain. Another's bundle without authorities is left out, so
// that its identities are refused: that is what an empty bundle means (SPIFFE Trust Domain and Bundle section 4.1.3).
func NewTrust(own *x509bundle.Bundle, others []*x509bundle.Bundle, generation uint64) (*Trust, error) {
	if own == nil || own.Empty() {
		return nil, api.E(api.BundleRejected, "the trust bundle has no authority")
	}
	td := own.TrustDomain()
	domains := map[spiffeid.TrustDomain]*x509bundle.Bundle{td: own}
	for _, o := range others {
		if domains[o.TrustDomain()] != nil {
			return nil, api.E(api.BundleRejected, "there are two trust bundles of one trust domain")
		}
		domains[o.TrustDomain()] = o
	}
	st := stamp{generation: generation, hash: api.BundleHash(own.X509Authorities())}
	t := &Trust{td: td}
	var err error
	if t.word, err = encodeTrust(NameRootCA, st, own); err != nil {
		return nil, err
	}
	if t.uri, err = encodeTrust(td.IDString(), st, own); err != nil {
		return nil, err
	}
	every := slices.SortedFunc(maps.Values(domains), func(a, b *x509bundle.Bundle) int {
		return a.TrustDomain().Compare(b.TrustDomain())
	})
	if t.all, err = encodeTrust(NameAll, st, every...); err != nil {
		return nil, err
	}
	return t, nil
}

// encodeTrust encodes bundles as one secret, each trust domain with roots of its own.
func encodeTrust(name string, st stamp, bundles ...*x509bundle.Bundle) (*encoded, error) {
	validator := &tls.SPIFFECertValidatorConfig{}
	h := sha256.New()
	for _, b := range bundles {
		roots := b.X509Authorities()
		if len(roots) == 0 {
			continue
		}
		// The order of roots means nothing; one order makes equal bundles equal bytes.
		slices.SortFunc(roots, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
		for _, c := range roots {
			if !c.BasicConstraintsValid || !c.IsCA {
				return nil, api.E(api.BundleRejected, "the trust bundle holds a certificate that is not an authority")
			}
		}
		fmt.Fprintf(h, "%s %s\n", b.TrustDomain().Name(), digest(roots))
		validator.TrustDomains = append(validator.TrustDomains, &tls.SPIFFECertValidatorConfig_TrustDomain{
			Name:        b.TrustDomain().Name(),
			TrustBundle: inline(encodePEM(roots)),
		})
	}
	config, err := anypb.New(validator)
	if err != nil {
		return nil, api.Wrap(api.BundleRejected, err, "the trust bundle cannot be encoded")
	}
	st.digest = hex.EncodeToString(h.Sum(nil)[:16])
	e, err := encode(name, api.FromSequence(st.generation).String(), st, &tls.Secret{
		Type: &tls.Secret_ValidationContext{ValidationContext: &tls.CertificateValidationContext{
			CustomValidatorConfig: &core.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: config},
		}},
	})
	if err != nil {
		return nil, api.Wrap(api.BundleRejected, err, "the trust bundle cannot be encoded")
	}
	e.trust = true
	return e, nil
}

// encode encodes content under name. The version is what people see in Envoy's config_dump: label, then the digest,
// which alone decides whether two are equal.
func encode(name, label string, st stamp, content *tls.Secret) (*encoded, error) {
	content.Name = name
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(content)
	if err != nil {
		return nil, err
	}
	return &encoded{stamp: st, resource: &discovery.Resource{
		Name:     name,
		Version:  label + "-" + st.digest,
		Resource: &anypb.Any{TypeUrl: TypeURL, Value: value},
	}}, nil
}

func inline(b []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
}

func encodePEM(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a bytes.Buffer takes everything
	}
	return b.Bytes()
}

// digest identifies certs in their order.
func digest(certs []*x509.Certificate) string {
	h := sha256.New()
	for _, c := range certs {
		h.Write(c.Raw)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
