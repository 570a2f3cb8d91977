package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/durable"
)

// Bounds of what is made and read.
const (
	breakGlassLife = 2 * 365 * 24 * time.Hour
	maxBreakGlass  = 64 << 10 // of a file
	maxBundleFile  = 1 << 20
)

func (a *app) breakGlassCommand() *cobra.Command {
	parent := &cobra.Command{
		Use:   "break-glass",
		Short: "A way in for the day on which no token can be had",
		Example: "  signet break-glass create safe-1 --trust-domain cluster.local --file safe-1.pem\n" +
			"  signet svid list --break-glass safe-1.pem",
	}
	parent.AddCommand(a.breakGlassCreateCommand())
	return parent
}

func (a *app) breakGlassCreateCommand() *cobra.Command {
	var file, domain string
	c := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a break-glass certificate, here and for two years",
		Long: "Make a key and a certificate that may do everything at the CA's operators' port, and print the line of the chart's\n" +
			"values (or of ca.yaml) by which the CA knows it: operators.breakGlass. Without that line it opens nothing.\n\n" +
			"The key is made on this machine and goes into the file alone, mode 0600; no cluster ever has it. Keep the file\n" +
			"offline. Each call that is made with it is on the ledger, in the log and in a metric.",
		Example: "  signet break-glass create safe-1 --trust-domain cluster.local --file safe-1.pem",
		Args:    oneArg("the certificate's name"),
	}
	c.Flags().StringVar(&file, "file", "", "`PATH` of the new file; required")
	c.Flags().StringVar(&domain, "trust-domain", "", "`NAME` of the trust domain; required")
	c.MarkFlagRequired("file")
	c.MarkFlagRequired("trust-domain")
	c.RunE = func(_ *cobra.Command, args []string) error {
		td, err := spiffeid.TrustDomainFromString(domain)
		if err != nil || td.Name() != domain {
			return usageError{fmt.Errorf("--trust-domain %.80q is not one", domain)}
		}
		id, err := api.AdminID(td, args[0])
		if err != nil {
			return usageError{fmt.Errorf("%.80q is not a name: letters, digits, dots, dashes, underscores", args[0])}
		}
		der, text, err := makeBreakGlass(id, a.now())
		if err != nil {
			return err
		}
		if err := durable.CreateFile(file, text, 0o600); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return &failure{err: api.Wrap(api.OutputFailed, err, file+" is there already"), why: "It is never overwritten: it may be somebody's only way in.", next: "signet break-glass create --help"}
			}
			return &failure{err: api.Wrap(api.OutputFailed, err, file+" cannot be written: "+err.Error())}
		}
		a.say("%s has the key: keep it offline, and put this line where the CA reads it:", file)
		_, err = fmt.Fprintf(a.stdout, "operators: {breakGlass: [%s]}\n", base64.StdEncoding.EncodeToString(der))
		return err
	}
	return c
}

// makeBreakGlass makes a certificate and the file that holds it with its key. It is its own issuer: what is kept in a safe
// must not die with an intermediate, and nobody who has one must be able to make it.
func makeBreakGlass(id spiffeid.ID, now time.Time) (der, file []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	var serial [20]byte
	rand.Read(serial[:])
	serial[0] = serial[0]&0x3f | 0x40 // positive and of full length (RFC 5280 section 4.1.2.2)
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]), NotBefore: now.Add(-time.Minute).UTC(), NotAfter: now.Add(breakGlassLife).UTC(),
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key); err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	file = append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...)
	return der, file, nil
}

// readBreakGlass reads the file that create has written.
func readBreakGlass(path string) (*tls.Certificate, error) {
	data, err := durable.Reading{FollowLinks: true}.ReadPrivate(path, maxBreakGlass)
	switch {
	case errors.Is(err, durable.ErrUnsafe):
		return nil, &failure{err: api.Wrap(api.FileUnsafe, err, "the break-glass file: "+err.Error()), next: "chmod 600 " + quoted(path)}
	case err != nil:
		return nil, unreadableFile(path, err)
	}
	c, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, unreadableFile(path, errors.New("it is not a certificate and its key, in PEM"))
	}
	return &c, nil
}

// readBundleFile reads a trust bundle in PEM, of a trust domain that is known unless it is zero.
func readBundleFile(path string, known spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, unreadableFile(path, err)
	}
	defer f.Close()
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(&limited{f, maxBundleFile}); err != nil {
		return nil, unreadableFile(path, err)
	}
	b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("unknown"), buf.Bytes())
	if err != nil || len(b.X509Authorities()) == 0 {
		return nil, unreadableFile(path, errors.New("it holds no certificates in PEM"))
	}
	return bundleOf(b.X509Authorities(), known)
}

// limited reads n bytes at most, and says so where there are more.
type limited struct {
	f *os.File
	n int
}

// Read implements io.Reader.
func (l *limited) Read(p []byte) (int, error) {
	if l.n <= 0 {
		return 0, errors.New("it is too large")
	}
	n, err := l.f.Read(p[:min(len(p), l.n)])
	l.n -= n
	return n, err
}

func unreadableFile(path string, err error) error {
	return &failure{err: api.Wrap(api.InputUnreadable, err, path+" cannot be read: "+clip(err.Error(), maxFound)), next: "ls -l " + quoted(path)}
}
