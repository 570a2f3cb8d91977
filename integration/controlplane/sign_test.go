//go:build cluster

package controlplane_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"strings"
)

// resign changes the claims of a token and signs it with the cluster's own key, under the header that it has.
func resign(keyFile string, token []byte, change func(object)) ([]byte, error) {
	data, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no key")
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	raw, err := payload(token)
	if err != nil {
		return nil, err
	}
	var claims object
	if err := json.Unmarshal(raw, &claims); err != nil {
		return nil, err
	}
	change(claims)
	if raw, err = json.Marshal(claims); err != nil {
		return nil, err
	}
	header, _, _ := strings.Cut(string(token), ".")
	signed := header + "." + base64.RawURLEncoding.EncodeToString(raw)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		return nil, err
	}
	return []byte(signed + "." + base64.RawURLEncoding.EncodeToString(signature)), nil
}
