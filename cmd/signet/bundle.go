package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// refreshHint is written into SPIFFE bundles: how often a consumer that polls should look again (SPIFFE Trust Domain and
// Bundle section 4.1.3; five minutes is the specification's own default).
const refreshHint = 5 * time.Minute

func (a *app) bundleCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "bundle",
		Short:   "The trust bundle: the roots that verify SVIDs",
		Example: "  signet bundle show -o pem > roots.pem",
	}
	c.AddCommand(a.bundleShowCommand())
	return c
}

func (a *app) bundleShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "show",
		Short: "Show the roots of the trust bundle and its generation",
		Long: "Show the roots of the trust bundle and its generation, EPOCH.NUMBER. The bundle's hash is checked before\n" +
			"anything is printed.",
		Example: "  signet bundle show\n" +
			"  signet bundle show -o pem > roots.pem        # for everything that reads PEM\n" +
			"  signet bundle show -o spiffe > bundle.json   # the SPIFFE bundle format, for federation",
		Args: noArgs,
	}
	o := outputFlags(c, "pem", "spiffe")
	c.RunE = func(c *cobra.Command, _ []string) error {
		b, err := once(a, func(ch *channel) (*trustBundle, error) { return a.getBundle(c.Context(), ch) })
		if err != nil {
			return err
		}
		return a.print(o, result{
			object: b.view(),
			text:   func(bool) []block { return []block{b.table(a.now())} },
			raw:    map[string]func(io.Writer) error{"pem": b.writePEM, "spiffe": b.writeSPIFFE},
			empty:  "the trust bundle of " + b.td.Name() + " has no roots: nothing is trusted",
		})
	}
	return c
}

// A trustBundle is the CA's answer, read and checked.
type trustBundle struct {
	td         spiffeid.TrustDomain
	generation api.Generation
	hash       []byte
	roots      []*x509.Certificate
}

// A bundleView is a trust bundle.
type bundleView struct {
	header
	TrustDomain string     `json:"trustDomain"`
	Generation  string     `json:"generation"` // EPOCH.NUMBER
	Epoch       uint32     `json:"epoch"`
	Number      uint32     `json:"number"`
	Hash        string     `json:"hash"` // lower-case hex, SHA-256 over the roots
	Roots       []certView `json:"roots"`
}

func (a *app) getBundle(ctx context.Context, ch *channel) (*trustBundle, error) {
	resp, err := ask(ctx, a, ch, ch.GetBundle, &apiv1.GetBundleRequest{})
	if err != nil {
		return nil, err
	}
	b, err := readBundle(resp)
	if err != nil {
		return nil, api.Wrap(api.Internal, err, "the CA's answer is not a trust bundle: "+err.Error())
	}
	return b, nil
}

func readBundle(resp *apiv1.GetBundleResponse) (*trustBundle, error) {
	td, err := spiffeid.TrustDomainFromString(resp.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	in := resp.GetBundle()
	b := &trustBundle{td: td, generation: api.Generation{Epoch: in.GetEpoch(), Number: in.GetNumber()}, hash: in.GetHash()}
	for i, der := range in.GetRoots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("root %d: %w", i+1, err)
		}
		b.roots = append(b.roots, c)
	}
	if want := api.BundleHash(b.roots); !bytes.Equal(want[:], b.hash) {
		return nil, fmt.Errorf("its hash is not that of its roots")
	}
	return b, nil
}

func (b *trustBundle) view() *bundleView {
	v := &bundleView{
		header:      newHeader("Bundle", b.td.Name()),
		TrustDomain: b.td.Name(),
		Generation:  b.generation.String(),
		Epoch:       b.generation.Epoch,
		Number:      b.generation.Number,
		Hash:        hex.EncodeToString(b.hash),
		Roots:       []certView{},
	}
	for _, c := range b.roots {
		v.Roots = append(v.Roots, newCertView(c))
	}
	return v
}

func (b *trustBundle) table(now time.Time) block {
	var rows [][]string
	for _, c := range b.roots {
		v := newCertView(c)
		rows = append(rows, []string{b.td.Name(), b.generation.String(), short(v.KeyID), v.Key, until(c.NotAfter, now, "EXPIRED"), v.Subject,
			dash(v.KeyID), v.NotBefore, v.NotAfter, v.SHA256, hex.EncodeToString(b.hash)})
	}
	return block{table: table([]column{{name: "trust-domain"}, {name: "generation"}, {name: "root"}, {name: "key"}, {name: "expires"},
		{name: "subject"}, {name: "key-id", wide: true}, {name: "not-before", wide: true}, {name: "not-after", wide: true},
		{name: "sha256", wide: true}, {name: "bundle-hash", wide: true}}, rows)}
}

func (b *trustBundle) writePEM(w io.Writer) error {
	for _, c := range b.roots {
		if _, err := io.WriteString(w, pemOf(c)); err != nil {
			return err
		}
	}
	return nil
}

// writeSPIFFE writes the SPIFFE bundle format, its sequence the generation.
func (b *trustBundle) writeSPIFFE(w io.Writer) error {
	sb := spiffebundle.FromX509Authorities(b.td, b.roots)
	sb.SetSequenceNumber(b.generation.Sequence())
	sb.SetRefreshHint(refreshHint)
	doc, err := sb.Marshal()
	if err != nil {
		return err
	}
	// An empty set means that all is revoked; its member must be there and an array, and the library writes null.
	doc = bytes.Replace(doc, []byte(`"keys":null`), []byte(`"keys":[]`), 1)
	var out bytes.Buffer
	if err := json.Indent(&out, doc, "", "    "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = out.WriteTo(w)
	return err
}
