package issuance

import (
	"crypto/x509"
	"encoding/asn1"
	"iter"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// The kinds of GeneralName that matter here (RFC 5280 section 4.2.1.6).
const (
	nameDNS = 2
	nameURI = 6
)

// generalNames yields the names of the value of a subjectAltName extension, of any kind. An error is the last thing it
// yields. crypto/x509 is no help: it drops the kinds that it does not know and rewrites URIs that it parses.
func generalNames(value []byte) iter.Seq2[asn1.RawValue, error] {
	return func(yield func(asn1.RawValue, error) bool) {
		list, err := element(value)
		if err != nil || !isUniversal(list, asn1.TagSequence) {
			yield(asn1.RawValue{}, errDER)
			return
		}
		for name, err := range elements(list.Bytes) {
			if err == nil && name.Class != asn1.ClassContextSpecific {
				err = errDER
			}
			if !yield(name, err) || err != nil {
				return
			}
		}
	}
}

// sanNames are the names of one certificate.
type sanNames struct {
	critical bool
	uris     []string // as they are written, not as a URL library would write them
	others   int      // names that are neither URI nor DNS name
	err      error    // they do not parse: then there are none
}

// namesOf reads the subjectAltName of a parsed certificate; without one it is the zero value.
func namesOf(c *x509.Certificate) sanNames {
	var names sanNames
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		names.critical = ext.Critical
		for name, err := range generalNames(ext.Value) {
			switch {
			case err != nil:
				return sanNames{err: err}
			case isContext(name, nameURI, false):
				names.uris = append(names.uris, string(name.Bytes))
			case !isContext(name, nameDNS, false):
				names.others++
			}
		}
	}
	return names
}

// uri returns the one URI.
func (n *sanNames) uri() (string, error) {
	if n.err == nil && len(n.uris) != 1 {
		return "", errURICount
	}
	if n.err != nil {
		return "", n.err
	}
	return n.uris[0], nil
}

// workloadID returns the SPIFFE ID of a leaf that has exactly one URI and a workload's ID in it.
func (n *sanNames) workloadID() (spiffeid.ID, error) {
	uri, err := n.uri()
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := api.ParseWorkloadID(uri)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, checkTrustDomain(id.TrustDomain())
}
