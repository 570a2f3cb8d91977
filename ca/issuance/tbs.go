package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"

	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// unsigned is a certificate that wants only its signature.
type unsigned struct {
	tbs       []byte            // DER of the TBSCertificate (RFC 5280 section 4.1)
	algorithm asn1.RawValue     // the AlgorithmIdentifier of the signature, from within tbs
	opts      crypto.SignerOpts // how a signer is asked for that signature
	preview   *x509.Certificate // tbs as it parses; its signature is one zero byte
}

// build encodes a certificate for pub under parent, to be signed by the key whose public half is issuer. The encoder is
// crypto/x509's: it is given a signer that keeps what it should sign and refuses to. So the bytes are exactly those of
// x509.CreateCertificate, and no private key is anywhere near while they are made and checked.
func build(template, parent *x509.Certificate, pub, issuer crypto.PublicKey) (*unsigned, error) {
	keep := &keeper{public: issuer}
	_, err := x509.CreateCertificate(rand.Reader, template, parent, pub, keep)
	if !errors.Is(err, errKept) {
		return nil, fmt.Errorf("encoding a certificate: %w", err)
	}
	var head struct { // what follows is skipped
		Version   asn1.RawValue
		Serial    asn1.RawValue
		Algorithm asn1.RawValue
	}
	if _, err := asn1.Unmarshal(keep.tbs, &head); err != nil {
		return nil, fmt.Errorf("reading a to-be-signed certificate: %w", err)
	}
	u := &unsigned{tbs: keep.tbs, algorithm: head.Algorithm, opts: keep.opts}
	u.preview, err = u.with([]byte{0})
	return u, err
}

// with returns the certificate as it is with that signature. It is parsed from the encoded form, and what it says is what
// was built.
func (u *unsigned) with(signature []byte) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(u.encode(signature))
	if err != nil {
		return nil, fmt.Errorf("reading a certificate back: %w", err)
	}
	if !bytes.Equal(c.RawTBSCertificate, u.tbs) {
		return nil, errors.New("a certificate does not say what was to be signed")
	}
	return c, nil
}

// encode returns the DER of the certificate with that signature (RFC 5280 section 4.1).
func (u *unsigned) encode(signature []byte) []byte {
	w := newBackwards(len(u.tbs) + len(u.algorithm.FullBytes) + len(signature) + 16)
	w.put(signature)
	w.put([]byte{0}) // whole bytes
	w.wrap(cbasn1.BIT_STRING, 0)
	w.put(u.algorithm.FullBytes)
	w.put(u.tbs)
	w.wrap(cbasn1.SEQUENCE, 0)
	return w.bytes()
}

var errBadSignature = errors.New("the signature is not good")

// signChecked is sign for a certificate whose preview was checked: nothing is parsed or looked at again but the signature,
// under the parent's key. It is over the bytes that were looked at, and these are what is released: no signer ever had them.
// The error is errBadSignature, or the key's.
func (u *unsigned) signChecked(key crypto.Signer, parent *x509.Certificate) (*x509.Certificate, error) {
	signature, err := crypto.SignMessage(key, rand.Reader, u.tbs, u.opts)
	if err != nil {
		return nil, err
	}
	looked := u.preview.RawTBSCertificate
	if !bytes.Equal(looked, u.tbs) {
		return nil, fmt.Errorf("%w: what was signed is not what was looked at", errBadSignature)
	}
	if err := parent.CheckSignature(u.preview.SignatureAlgorithm, looked, signature); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadSignature, err)
	}
	u.tbs = looked
	u.preview.Raw, u.preview.Signature = u.encode(signature), signature // its other parts stay what they are
	return u.preview, nil
}

// sign asks key for the signature. Whether it is a good one is for the caller to check.
func (u *unsigned) sign(key crypto.Signer) (*x509.Certificate, error) {
	signature, err := crypto.SignMessage(key, rand.Reader, u.tbs, u.opts)
	if err != nil {
		return nil, err
	}
	return u.with(signature)
}

var errKept = errors.New("kept, not signed")

// keeper is a crypto.MessageSigner that remembers the message instead of signing it.
type keeper struct {
	public crypto.PublicKey
	tbs    []byte
	opts   crypto.SignerOpts
}

func (k *keeper) Public() crypto.PublicKey { return k.public }

func (k *keeper) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.tbs, k.opts = bytes.Clone(msg), opts
	return nil, errKept
}

func (k *keeper) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("asked to sign a digest, not a message")
}

// serialBytes is the length of a serial number, the most that RFC 5280 section 4.1.2.2 allows.
const serialBytes = 20

// drawSerial draws a serial number of 20 bytes of which 158 bits are random. The top bit is clear, since DER would take it
// for a sign, and the next one set, so that every serial has the same length wherever it is written.
func drawSerial() (b [serialBytes]byte) {
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	b[0] = b[0]&0x7f | 0x40
	return b
}

// newSerial is drawSerial as a number.
func newSerial() *big.Int {
	b := drawSerial()
	return new(big.Int).SetBytes(b[:])
}

// SerialString is a serial number as it is written everywhere: lower-case hex of whole bytes, most significant first.
func SerialString(serial *big.Int) string { return hex.EncodeToString(serial.Bytes()) }
