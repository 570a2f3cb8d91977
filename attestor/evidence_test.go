package attestor_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

func accepted(t testing.TB, c cluster, token string) attestor.Claims {
	t.Helper()
	got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// threat: A22
func TestFromMetadata(t *testing.T) {
	token := newCluster(t, "ES256").token(t)
	largest := strings.Repeat("a", api.MaxTokenBytes)
	for _, r := range []struct {
		name   string
		values []string
		token  string
		want   api.Reason
	}{
		{"bare", []string{token}, token, ""},
		{"Bearer", []string{"Bearer " + token}, token, ""},
		{"bearer", []string{"bearer " + token}, token, ""},
		{"largest", []string{"Bearer " + largest}, largest, ""},
		{"not a token at all", []string{"hello"}, "hello", ""}, // the attestor's part
		{"none", nil, "", api.TokenMissing},
		{"empty", []string{""}, "", api.TokenMissing},
		{"Bearer and nothing", []string{"Bearer "}, "", api.TokenMissing},
		{"Bearer alone", []string{"Bearer"}, "", api.TokenMissing},
		{"A22 two values", []string{token, token}, "", api.TokenAmbiguous},
		{"A22 a value and an empty one", []string{token, ""}, "", api.TokenAmbiguous},
		{"A22 Bearer twice", []string{"Bearer Bearer " + token}, "", api.TokenAmbiguous},
		{"A22 two tokens", []string{"Bearer " + token + " " + token}, "", api.TokenAmbiguous},
		{"A22 joined by a proxy", []string{"Bearer " + token + ", Bearer " + token}, "", api.TokenAmbiguous},
		{"A22 comma", []string{token + "," + token}, "", api.TokenAmbiguous},
		{"A22 newline", []string{"Bearer " + token + "\n"}, "", api.TokenAmbiguous},
		{"A22 NUL", []string{token + "\x00"}, "", api.TokenAmbiguous},
		{"A22 two spaces", []string{"Bearer  " + token}, "", api.TokenAmbiguous},
		{"A22 tab", []string{"Bearer\t" + token}, "", api.TokenAmbiguous},
		{"Basic", []string{"Basic dXNlcjpwYXNz"}, "", api.TokenAmbiguous},
		{"A21 one too large", []string{largest + "a"}, "", api.TokenTooLarge},
		{"A21 one too large after Bearer", []string{"Bearer " + largest + "a"}, "", api.TokenTooLarge},
		{"A21 1 MiB of newlines", []string{strings.Repeat("\n", 1<<20)}, "", api.TokenTooLarge},
	} {
		t.Run(r.name, func(t *testing.T) {
			e, err := attestor.FromMetadata(r.values)
			checkEvidence(t, e, err, r.token, r.want)
		})
	}
}

func checkEvidence(t *testing.T, e attestor.Evidence, err error, token string, want api.Reason) {
	t.Helper()
	if want != "" {
		if err == nil || api.ReasonOf(err) != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if e.Kind != "" || e.Data != nil {
			t.Error("evidence beside an error")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if e.Kind != api.EvidenceServiceAccount || string(e.Data) != token {
		t.Errorf("got kind %q and %d bytes, want %d", e.Kind, len(e.Data), len(token))
	}
}

// threat: A22
func TestTokenFile(t *testing.T) {
	c := newCluster(t, "ES256")
	token := c.token(t)
	largest := strings.Repeat("a", api.MaxTokenBytes)
	for _, r := range []struct {
		name, content, token string
		want                 api.Reason
	}{
		{"as kubelet writes it", token, token, ""},
		{"one newline", token + "\n", token, ""},
		{"largest", largest + "\n", largest, ""},
		{"two newlines", token + "\n\n", "", api.TokenAmbiguous},
		{"carriage return", token + "\r\n", "", api.TokenAmbiguous},
		{"newline before", "\n" + token, "", api.TokenAmbiguous},
		{"two tokens", token + "\n" + token, "", api.TokenAmbiguous},
		{"empty", "", "", api.TokenMissing},
		{"a newline", "\n", "", api.TokenMissing},
		{"too large", largest + "a", "", api.TokenTooLarge},
		{"a certificate bundle", strings.Repeat("-----BEGIN CERTIFICATE-----\n", 1000), "", api.TokenTooLarge},
	} {
		t.Run(r.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(path, []byte(r.content), 0o600); err != nil {
				t.Fatal(err)
			}
			e, err := attestor.TokenFile{Path: path}.Prove(t.Context())
			checkEvidence(t, e, err, r.token, r.want)
		})
	}
	t.Run("read anew", func(t *testing.T) {
		file := attestor.TokenFile{Path: filepath.Join(t.TempDir(), "token")}
		e, err := file.Prove(t.Context())
		checkEvidence(t, e, err, "", api.TokenMissing)
		seen := map[string]bool{}
		for range 3 {
			if err := c.WriteToken(file.Path, c.pod, audience, ttl); err != nil {
				t.Fatal(err)
			}
			e, err := file.Prove(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			seen[accepted(t, c, string(e.Data)).TokenID] = true
		}
		if len(seen) != 3 {
			t.Errorf("%d different tokens of 3", len(seen))
		}
	})
	t.Run("neither a folder nor a FIFO", func(t *testing.T) {
		fifo := filepath.Join(t.TempDir(), "fifo")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Skip(err)
		}
		for _, path := range []string{fifo, filepath.Dir(fifo)} {
			e, err := attestor.TokenFile{Path: path}.Prove(t.Context())
			checkEvidence(t, e, err, "", api.TokenMissing)
		}
	})
}
