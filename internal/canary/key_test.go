package canary

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestNewKey proves that a key is found however it is printed, and that its public half may be.
func TestNewKey(t *testing.T) {
	var s Search
	s.AddKeys()
	seen := map[string]bool{}
	for range 1000 {
		key, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		sec1, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		for form, text := range map[string]string{
			"DER": string(der), "hex": hex.EncodeToString(der), "bytes": fmt.Sprint(der), "number": fmt.Sprint(key), "fields": fmt.Sprintf("%+v", key),
			"PKCS8": string(text), "quoted": fmt.Sprintf("%q", text), "twice": fmt.Sprintf("%q", fmt.Sprintf("%q", text)),
			"SEC1":     string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})),
			"indented": "    " + strings.ReplaceAll(string(text), "\n", "\r\n    "),
		} {
			if found := s.Find([]byte(text)); !slices.Equal(slices.Compact(found), []string{"a private key"}) {
				t.Fatalf("%s: found %v in %s", form, found, text)
			}
		}
		public, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if found := s.Find(append(fmt.Append(nil, key.Public()), public...)); len(found) > 0 || seen[string(public)] {
			t.Fatalf("the public key: found %v, or it was there before", found)
		}
		seen[string(public)] = true
	}
}
