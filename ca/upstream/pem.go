package upstream

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/durable"
)

// Bounds of what is read: a key of RSA 8192 has 6 KiB, a certificate seldom more than 2.
const (
	maxKeyFile   = 32 << 10
	maxCertsFile = 256 << 10
	maxChainPEM  = 9 // as many as a chain may have, with its root
	maxRootsPEM  = 16
)

// read reads the files and checks them together. The errors name a file and what is wrong, and nothing of what is in it.
func (d *disk) read(now time.Time) (*fileSet, error) {
	c := d.config
	key, err := readKey(c)
	if err != nil {
		return nil, err
	}
	chain, err := readCertificates("the certificate file", c.CertificateFile, maxChainPEM)
	if err != nil {
		return nil, err
	}
	equal, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !equal.Equal(chain[0].PublicKey) {
		return nil, api.E(api.UpstreamFiles, "the key does not belong to the first certificate of the certificate file")
	}
	given := chain[:1]
	if c.RootsFile != "" {
		if given, err = readCertificates("the roots file", c.RootsFile, maxRootsPEM); err != nil {
			return nil, err
		}
	} else if !selfSigned(chain[0]) {
		return nil, api.E(api.UpstreamFiles, "the certificate is not a root: upstream.disk.rootsFile has to name its roots")
	}
	if len(chain[0].SubjectKeyId) == 0 {
		return nil, api.E(api.UpstreamFiles, "the certificate has no subject key identifier, by which an issuer is found")
	}
	set := &fileSet{key: key, chain: chain, at: now}
	for _, root := range given {
		if !selfSigned(root) {
			return nil, api.E(api.UpstreamFiles, "a certificate in the roots file is not self-signed, so it is not a root")
		}
		if issuance.PathTo(chain, root, now) != nil && !slices.ContainsFunc(set.roots, root.Equal) {
			set.roots = append(set.roots, root)
		}
	}
	if len(set.roots) == 0 {
		return nil, api.E(api.UpstreamFiles, "the certificates do not lead to a root, or one of them has expired or is not valid yet")
	}
	return set, nil
}

func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, c.RawSubject) && c.IsCA && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

// readKey reads the one private key of a file that nobody else may read.
func readKey(c DiskConfig) (crypto.Signer, error) {
	data, err := durable.Reading{FollowLinks: c.MountedSecret, GroupRead: c.MountedSecret}.ReadPrivate(c.KeyFile, maxKeyFile)
	defer func() { clear(data) }()
	switch {
	case errors.Is(err, durable.ErrUnsafe):
		return nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("the upstream's key: %v", err))
	case err != nil:
		return nil, unreadable("the key file", err)
	}
	return parseKey(data)
}

// parseKey returns the one private key in PEM data. Blocks of EC parameters, which say nothing that the key does not, are
// skipped; anything else is refused.
func parseKey(data []byte) (crypto.Signer, error) {
	var found any
	for block := range blocks(data) {
		switch {
		case block == nil:
			return nil, api.E(api.UpstreamFiles, "the key file is not PEM throughout")
		case block.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
			return nil, api.E(api.UpstreamKeyEncrypted, "the upstream's key is encrypted, and nobody is there to type its passphrase")
		case block.Type == "EC PARAMETERS":
			continue
		case found != nil:
			return nil, api.E(api.UpstreamFiles, "the key file holds more than one key")
		}
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			found, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			found, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			found, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			return nil, api.E(api.UpstreamFiles, "the key file holds something that is not a private key")
		}
		clear(block.Bytes)
		if err != nil { // its text may tell of the key
			return nil, api.E(api.UpstreamFiles, "the private key does not parse, or is of a kind that is not supported")
		}
	}
	key, ok := found.(crypto.Signer)
	if !ok {
		return nil, api.E(api.UpstreamFiles, "the key file holds no private key that can sign")
	}
	if err := issuance.CheckAuthorityKey(key.Public()); err != nil {
		return nil, err
	}
	return key, nil
}

// readCertificates reads the certificates of a file; what says it in errors.
func readCertificates(what, path string, most int) ([]*x509.Certificate, error) {
	data, err := readPublic(path, maxCertsFile)
	switch {
	case errors.Is(err, durable.ErrUnsafe):
		return nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("%s: %v", what, err))
	case err != nil:
		return nil, unreadable(what, err)
	}
	return parseCertificates(what, data, most)
}

// parseCertificates returns the certificates in PEM data, each once.
func parseCertificates(what string, data []byte, most int) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for block := range blocks(data) {
		switch {
		case block == nil:
			return nil, api.E(api.UpstreamFiles, "%s is not PEM throughout", what)
		case block.Type != "CERTIFICATE":
			return nil, api.E(api.UpstreamFiles, "%s holds something that is not a certificate", what)
		case len(certs) == most:
			return nil, api.E(api.UpstreamFiles, "%s holds more than %d certificates", what, most)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, api.E(api.UpstreamFiles, "certificate %d of %s does not parse", len(certs)+1, what)
		}
		if !slices.ContainsFunc(certs, c.Equal) {
			certs = append(certs, c)
		}
	}
	if len(certs) == 0 {
		return nil, api.E(api.UpstreamFiles, "%s holds no certificate", what)
	}
	return certs, nil
}

// blocks yields the PEM blocks of data, and nil, last, where something begins like one and is none. Text between blocks, as
// OpenSSL writes it, is skipped.
func blocks(data []byte) func(yield func(*pem.Block) bool) {
	return func(yield func(*pem.Block) bool) {
		begins := bytes.Count(data, []byte("-----BEGIN"))
		for n := 0; ; n++ {
			var block *pem.Block
			block, data = pem.Decode(data)
			if block == nil {
				if n != begins || len(data) > 0 && !text(data) {
					yield(nil)
				}
				return
			}
			if !yield(block) {
				return
			}
		}
	}
}

// text reports whether data is what people or tools write between blocks.
func text(data []byte) bool { return bytes.IndexByte(data, 0) < 0 }

// readPublic reads a regular file of at most max bytes that only its owner, the process's user or root, can have written:
// whoever writes roots says whom to believe.
func readPublic(path string, max int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would hold us for ever
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return nil, &durable.UnsafeError{Path: path, Why: "is not a regular file"}
	case info.Mode().Perm()&0o022 != 0:
		return nil, &durable.UnsafeError{Path: path, Why: fmt.Sprintf("has mode %#o: others can write it", info.Mode().Perm())}
	case !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return nil, &durable.UnsafeError{Path: path, Why: "belongs to another user"}
	}
	data, err := io.ReadAll(io.LimitReader(f, max+1)) // it may grow meanwhile
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > max {
		return nil, api.E(api.UpstreamFiles, "%s is larger than %d bytes", path, max)
	}
	return data, nil
}

// unreadable tells that a file is not there, or why it cannot be read.
func unreadable(what string, err error) error {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err // the paths are in the configuration
	}
	return api.Wrap(api.UpstreamUnavailable, err, fmt.Sprintf("%s of the upstream cannot be read: %v", what, err))
}
