package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signet-ca/signet/api"
)

// Limits of what is inspected. All of it is foreign input.
const (
	maxInput        = 1 << 20 // bytes of a file
	maxCertificates = 100     // in one chain or bundle
)

// A chain is what was found: certificates, leaf first if all is well.
type chain struct {
	source  string
	certs   []*x509.Certificate
	ignored int // PEM blocks that are no certificate, private keys for instance; their content is never looked at
}

// readChain reads from standard input ("-"), a file, or whoever answers at unix:PATH or HOST:PORT. A file of that name
// comes before an address.
func (a *app) readChain(ctx context.Context, target string) (*chain, error) {
	if target == "-" {
		return chainFrom("standard input", a.stdin)
	}
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		return a.handshake(ctx, "unix", strings.TrimPrefix(path, "//"), "")
	}
	if _, err := os.Stat(target); errors.Is(err, fs.ErrNotExist) {
		if host, port, err := net.SplitHostPort(target); err == nil && host != "" && port != "" && !strings.Contains(host, "/") {
			return a.handshake(ctx, "tcp", target, host)
		}
	}
	f, err := os.Open(target)
	if err != nil {
		return nil, unreadable(target, err)
	}
	defer f.Close()
	return chainFrom(target, f)
}

func unreadable(what string, err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	return &failure{err: api.Wrap(api.InputUnreadable, err, what+" cannot be read: "+err.Error()), next: "signet svid inspect --help"}
}

func chainFrom(source string, r io.Reader) (*chain, error) {
	data, err := readAll(r)
	if err != nil {
		return nil, unreadable(source, err)
	}
	certs, ignored, err := parseCertificates(data)
	if err != nil {
		return nil, unreadable(source, err)
	}
	return &chain{source: source, certs: certs, ignored: ignored}, nil
}

func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err == nil && len(data) > maxInput {
		err = fmt.Errorf("it is larger than %d bytes", maxInput)
	}
	return data, err
}

// parseCertificates reads PEM, or DER certificates one after the other. It passes over PEM blocks of other types.
func parseCertificates(data []byte) (certs []*x509.Certificate, ignored int, err error) {
	var ders [][]byte
	for rest := data; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			ignored++
			continue
		}
		ders = append(ders, b.Bytes)
		if len(ders) > maxCertificates {
			return nil, ignored, fmt.Errorf("it holds more than %d certificates", maxCertificates)
		}
	}
	switch {
	case len(ders) > 0:
	case ignored > 0:
		return nil, ignored, errors.New("it holds PEM, but no certificate")
	case len(bytes.TrimSpace(data)) == 0:
		return nil, 0, errors.New("it is empty")
	default:
		if ders = splitDER(data); ders == nil {
			return nil, 0, errors.New("it is neither PEM nor a DER certificate")
		}
	}
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, ignored, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		certs = append(certs, c)
	}
	return certs, ignored, nil
}

// handshake asks a TLS server for its chain. It verifies nothing, since that is what the rules are for, sends no
// certificate, and no byte after the handshake. A server that goes on to refuse us has shown its chain all the same. It has
// as long as --timeout says.
func (a *app) handshake(ctx context.Context, network, address, host string) (*chain, error) {
	ctx, cancel := a.bounded(ctx)
	defer cancel()
	ch := &chain{source: address}
	conf := &tls.Config{
		InsecureSkipVerify: true, // to look at a chain is not to trust it
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			for _, der := range raw[:min(len(raw), maxCertificates)] {
				c, err := x509.ParseCertificate(der)
				if err != nil {
					return err
				}
				ch.certs = append(ch.certs, c)
			}
			return nil
		},
	}
	if net.ParseIP(host) == nil {
		conf.ServerName = host
	}
	conn, err := (&tls.Dialer{Config: conf}).DialContext(ctx, network, address)
	if err == nil {
		conn.Close()
	}
	switch {
	case len(ch.certs) > 0:
		return ch, nil
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &failure{err: api.Wrap(api.DeadlineExceeded, err, address+" did not finish a TLS handshake within "+a.timeout.String()),
			why: "It does not answer, or waits for the client to speak another protocol first."}
	case err == nil:
		err = errors.New("it showed no certificate")
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		err = errors.New("what answers there does not speak TLS")
	}
	return nil, unreadable(address, err)
}

// readRoots reads the trust bundle of --bundle: PEM, DER, or the SPIFFE bundle format.
func readRoots(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, unreadable(path, err)
	}
	defer f.Close()
	data, err := readAll(f)
	if err != nil {
		return nil, unreadable(path, err)
	}
	roots, err := parseRoots(data)
	if err != nil {
		return nil, unreadable(path, err)
	}
	return roots, nil
}

func parseRoots(data []byte) ([]*x509.Certificate, error) {
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return parseSPIFFEBundle(data)
	}
	roots, _, err := parseCertificates(data)
	return roots, err
}

// parseSPIFFEBundle reads the X.509 authorities of a SPIFFE bundle (SPIFFE Trust Domain and Bundle section 4, X509-SVID
// section 6). Entries of other uses or without x5c are passed over, and so is all but the first certificate of an
// entry. A document without keys is no bundle, while one with no entries is a bundle that trusts nothing.
func parseSPIFFEBundle(data []byte) ([]*x509.Certificate, error) {
	var doc struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("it is not a SPIFFE bundle: %w", err)
	}
	if doc.Keys == nil {
		return nil, errors.New("it is not a SPIFFE bundle: it has no keys")
	}
	var roots []*x509.Certificate
	for i, raw := range *doc.Keys {
		var key struct {
			Kty string   `json:"kty"`
			Use string   `json:"use"`
			X5C []string `json:"x5c"`
		}
		if err := json.Unmarshal(raw, &key); err != nil || key.Kty == "" || key.Use != "x509-svid" || len(key.X5C) == 0 {
			continue
		}
		der, err := base64.StdEncoding.DecodeString(key.X5C[0])
		if err == nil {
			var c *x509.Certificate
			if c, err = x509.ParseCertificate(der); err == nil {
				roots = append(roots, c)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		if len(roots) > maxCertificates {
			return nil, fmt.Errorf("it holds more than %d certificates", maxCertificates)
		}
	}
	return roots, nil
}

// splitDER cuts DER values that follow one another, and returns nil when that is not what data is.
func splitDER(data []byte) [][]byte {
	var ders [][]byte
	in := cryptobyte.String(data)
	for !in.Empty() {
		var der cryptobyte.String
		if len(ders) == maxCertificates || !in.ReadASN1Element(&der, cbasn1.SEQUENCE) {
			return nil
		}
		ders = append(ders, der)
	}
	return ders
}
