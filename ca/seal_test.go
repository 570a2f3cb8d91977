package ca_test

import (
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

// TestSeal seals and opens, and opens nothing else.
func TestSeal(t *testing.T) {
	key := ca.NewSealKey()
	s, err := ca.NewSealer(key)
	if err != nil {
		t.Fatal(err)
	}
	plain := []byte("the root's private key")
	sealed := s.Seal(plain, "example.org/01")
	again := s.Seal(plain, "example.org/01")
	if got, err := s.Open(sealed, "example.org/01"); err != nil || string(got) != string(plain) {
		t.Fatalf("opened %q (%v)", got, err)
	}
	if string(sealed) == string(again) {
		t.Error("two seals of one text are alike")
	}
	if strings.Contains(string(sealed), string(plain[4:12])) {
		t.Error("the text shows")
	}
	other, err := ca.NewSealer(ca.NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.Open(sealed, "example.org/01")
	wantReason(t, err, api.SealKeyWrong)
	for _, context := range []string{"", "example.org/02", "example.org/0", "other.org/01"} {
		_, err = s.Open(sealed, context)
		wantReason(t, err, api.SealKeyWrong)
	}
	for i := range sealed {
		changed := []byte(string(sealed))
		changed[i] ^= 1
		_, err := s.Open(changed, "example.org/01")
		want := api.SealKeyWrong
		if i == 0 { // the format
			want = api.StateCorrupt
		}
		wantReason(t, err, want)
	}
	for n := range sealed {
		_, err := s.Open(sealed[:n], "example.org/01")
		want := api.SealKeyWrong
		if n == 0 {
			want = api.StateCorrupt
		}
		wantReason(t, err, want)
	}
	if _, err := s.Open(append(sealed, 0), "example.org/01"); err == nil {
		t.Error("something behind the seal")
	}
	for _, n := range []int{0, 16, 24, 31, 33, 44, 64} {
		_, err := ca.NewSealer(make([]byte, n))
		wantReason(t, err, api.SealKeyWrong)
	}
}
