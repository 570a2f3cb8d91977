package canary

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestFind proves that the search can fail: it finds a secret in each form, at each offset, and nothing where there is
// none.
func TestFind(t *testing.T) {
	var s Search
	s.Add("marker", []byte(Marker))
	s.Add("bytes", []byte{1, 22, 255, 0, 9, 10, 100, 99, 7, 200, 13, 14, 15})
	s.Add("short", []byte("short"))
	for _, secret := range []struct {
		name  string
		bytes []byte
	}{{"marker", []byte(Marker)}, {"bytes", []byte{1, 22, 255, 0, 9, 10, 100, 99, 7, 200, 13, 14, 15}}} {
		for before := range 4 {
			for after := range 4 {
				around := slices.Concat([]byte(strings.Repeat("x", before)), secret.bytes, []byte(strings.Repeat("y", after)))
				for form, text := range map[string]string{
					"plain":      string(around),
					"hex":        hex.EncodeToString(around),
					"HEX":        strings.ToUpper(hex.EncodeToString(around)),
					"base64":     base64.StdEncoding.EncodeToString(around),
					"base64url":  base64.RawURLEncoding.EncodeToString(around),
					"go's bytes": fmt.Sprint(around),
				} {
					if found := s.Find([]byte("before " + text + " after")); !slices.Equal(found, []string{secret.name}) {
						t.Errorf("%s as %s between %d and %d bytes: %v", secret.name, form, before, after, found)
					}
				}
			}
		}
	}
	for _, clean := range []string{"", "short", Marker[1:], Marker[:len(Marker)-1], strings.ToUpper(Marker)} {
		if found := s.Find([]byte(clean)); len(found) > 0 {
			t.Errorf("%q has %v in it", clean, found)
		}
	}
	if n := s.Longest(); n < 2*len(Marker) {
		t.Errorf("the longest form has %d bytes", n)
	}
}
