package main

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// An inspection is what svid inspect found.
type inspection struct {
	header
	Source       string     `json:"source"`
	SPIFFEID     string     `json:"spiffeID,omitempty"` // of the leaf, as it stands there
	Verified     string     `json:"verified"`           // yes, no, or not asked
	Certificates []certView `json:"certificates"`
	Findings     []finding  `json:"findings"`
}

// Whether a chain verifies under a bundle.
const (
	verifiedYes      = "yes"
	verifiedNo       = "no"
	verifiedNotAsked = "not asked"
)

func (a *app) svidInspectCommand() *cobra.Command {
	var bundle string
	c := &cobra.Command{
		Use:   "inspect FILE|-|HOST:PORT|unix:PATH",
		Short: "Show a certificate chain and what is wrong with it as an SVID",
		Long: "Show a certificate chain, of a PEM or DER file, of standard input, or as a TLS server presents it, and each rule\n" +
			"of SPIFFE X509-SVID that it breaks; exit code 3 when it breaks one. With --bundle it is verified, too. Private\n" +
			"keys in the file are passed over and never shown. To a server no certificate is sent.",
		Example: "  signet svid inspect web.pem\n" +
			"  signet svid inspect localhost:8443 --bundle roots.pem\n" +
			"  openssl s_client -connect web:443 -showcerts </dev/null | signet svid inspect -",
		Args: oneArg("a file, - or an address"),
	}
	o := outputFlags(c)
	c.Flags().StringVar(&bundle, "bundle", "", "verify under the roots in this `FILE`: PEM, or the SPIFFE bundle format")
	c.MarkFlagFilename("bundle")
	c.RunE = func(c *cobra.Command, args []string) error {
		var roots []*x509.Certificate
		if bundle != "" {
			var err error
			if roots, err = readRoots(bundle); err != nil {
				return err
			}
			if roots == nil {
				roots = []*x509.Certificate{} // a bundle that trusts nothing is still one to verify under
			}
		}
		ch, err := a.readChain(c.Context(), args[0])
		if err != nil {
			return err
		}
		in := newInspection(ch, roots, a.now())
		if err := a.print(o, result{object: in, text: func(bool) []block { return describeInspection(in, ch.certs, a.now()) }}); err != nil {
			return err
		}
		if ch.ignored > 0 {
			a.say("%s in the file passed over: not a certificate", plural(ch.ignored, "PEM block"))
		}
		return in.outcome(a)
	}
	return c
}

func newInspection(ch *chain, roots []*x509.Certificate, now time.Time) *inspection {
	in := &inspection{Source: ch.source, Verified: verifiedNotAsked, Findings: inspect(ch.certs, roots, now)}
	for _, c := range ch.certs {
		in.Certificates = append(in.Certificates, newCertView(c))
	}
	if uris := in.Certificates[0].URIs; len(uris) == 1 {
		in.SPIFFEID = uris[0]
	}
	if roots != nil {
		in.Verified = verifiedYes
		if in.errors() > 0 {
			in.Verified = verifiedNo
		}
	}
	in.header = newHeader("Inspection", cmp.Or(in.SPIFFEID, in.Source))
	return in
}

func (in *inspection) errors() int {
	n := 0
	for _, f := range in.Findings {
		if f.Level == levelError {
			n++
		}
	}
	return n
}

func (in *inspection) outcome(a *app) error {
	n := in.errors()
	summary := plural(n, "error") + ", " + plural(len(in.Findings)-n, "warning")
	if n > 0 {
		return &findings{summary: summary}
	}
	if len(in.Findings) == 0 {
		summary = "no findings"
	}
	a.say("%s", summary)
	return nil
}

func describeInspection(in *inspection, certs []*x509.Certificate, now time.Time) []block {
	leaf := in.Certificates[0]
	var names []string
	for _, n := range [][]string{leaf.URIs, leaf.DNSNames, leaf.IPs, leaf.Emails} {
		names = append(names, n...)
	}
	verified := in.Verified
	if verified == verifiedNotAsked {
		verified += "; give --bundle FILE"
	}
	about := block{pairs: []pair{
		{"Source", in.Source},
		{"SPIFFE ID", in.SPIFFEID},
		{"Names", strings.Join(names, " ")},
		{"Serial", leaf.Serial},
		{"Valid", leaf.NotBefore + " to " + leaf.NotAfter},
		{"Expires in", until(certs[0].NotAfter, now, "EXPIRED")},
		{"Key", leaf.Key},
		{"Subject", leaf.Subject},
		{"Issuer", leaf.Issuer},
		{"Issuer key", leaf.AuthorityKeyID},
		{"Key usage", strings.Join(leaf.KeyUsage, " ")},
		{"Extended", strings.Join(leaf.ExtKeyUsage, " ")},
		{"Signature", leaf.Signature},
		{"Verified", verified},
	}}
	var rows [][]string
	for i, v := range in.Certificates {
		kind := "leaf"
		if v.IsCA {
			kind = "authority"
		}
		rows = append(rows, []string{fmt.Sprint(i + 1), kind, dash(v.Subject), v.Key, until(certs[i].NotAfter, now, "EXPIRED"), short(v.KeyID),
			short(v.AuthorityKeyID), v.SHA256})
	}
	list := block{title: "Chain", table: table([]column{{name: "#"}, {name: "kind"}, {name: "subject"}, {name: "key"}, {name: "expires"},
		{name: "key-id"}, {name: "signed-by"}, {name: "sha256", wide: true}}, rows)}
	rows = nil
	for _, f := range in.Findings {
		rows = append(rows, []string{string(f.Level), f.Rule, fmt.Sprint(f.Certificate), f.Message, f.Source})
	}
	return []block{about, list, {title: "Findings", table: table([]column{{name: "level"}, {name: "rule"}, {name: "#"}, {name: "message"},
		{name: "source"}}, rows)}}
}
