// Package wycheproof reads the test vectors of the module github.com/c2sp/wycheproof for tests: signatures and keys that
// broke somebody's verification once. They are read from the module's folder and not linked, since they are 100 MB; the
// first run fetches the module, as go.sum has it, and later ones need no network.
package wycheproof

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// Hex is a byte string that is written in hex.
type Hex []byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	*h = b
	return err
}

// File is one file of vectors. Only what our tests use of it is read.
type File struct {
	Name   string  `json:"-"`
	Groups []Group `json:"testGroups"`
}

// Group are vectors that share a key.
type Group struct {
	Type      string          `json:"type"`
	Comment   string          `json:"comment"`
	SHA       string          `json:"sha"`
	MGFSHA    string          `json:"mgfSha"`
	SaltLen   int             `json:"sLen"`
	PublicDER Hex             `json:"publicKeyDer"`
	PublicJWK json.RawMessage `json:"publicKeyJwk"`
	KeyJWK    json.RawMessage `json:"keyJwk"`
	Public    json.RawMessage `json:"public"`  // of JOSE vectors: a JWK or a set
	Private   json.RawMessage `json:"private"` // so
	Tests     []Vector        `json:"tests"`
}

// Vector is one test.
type Vector struct {
	ID      int             `json:"tcId"`
	Comment string          `json:"comment"`
	Flags   []string        `json:"flags"`
	Msg     Hex             `json:"msg"`
	Sig     Hex             `json:"sig"`
	JWS     string          `json:"jws"`
	Public  json.RawMessage `json:"public"` // of key agreement: a JWK, or DER in hex
	Result  string          `json:"result"` // "valid", "invalid" or "acceptable"
}

// folder is where the module lies. Nothing that is built needs it, so it is fetched here where the cache lacks it.
var folder = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "mod", "download", "-json", "github.com/c2sp/wycheproof").Output()
	if err != nil {
		return "", err
	}
	var module struct{ Dir string }
	err = json.Unmarshal(out, &module)
	return module.Dir, err
})

// Read returns the files that match a pattern (path.Match); at least one must.
func Read(t testing.TB, pattern string) []File {
	t.Helper()
	dir, err := folder()
	if err != nil || dir == "" {
		t.Fatalf("the module of the test vectors is not there: %v", err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "testvectors_v1", pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("no vectors match %s (%v)", pattern, err)
	}
	files := make([]File, len(names))
	for i, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, &files[i]); err != nil {
			t.Fatalf("%s: %v", filepath.Base(name), err)
		}
		files[i].Name = filepath.Base(name)
	}
	return files
}

// Tally counts what became of vectors.
type Tally struct {
	Accepted, Refused int
	Acceptable        int            // of both: the vectors leave it open
	Rules             map[string]int // valid vectors that a rule of ours refuses
}

// Count notes one vector, and fails where the verdict is wrong. rule names the rule of ours by which it was refused, if it
// was one.
func (c *Tally) Count(t testing.TB, where string, v Vector, accepted bool, rule string) {
	t.Helper()
	if accepted {
		c.Accepted++
	} else {
		c.Refused++
	}
	switch {
	case v.Result == "acceptable":
		c.Acceptable++
	case v.Result == "invalid" && accepted:
		t.Errorf("%s, vector %d (%s) is invalid and was accepted", where, v.ID, v.Comment)
	case v.Result == "valid" && !accepted && rule == "":
		t.Errorf("%s, vector %d (%s) is valid and was refused", where, v.ID, v.Comment)
	case v.Result == "valid" && !accepted:
		if c.Rules == nil {
			c.Rules = map[string]int{}
		}
		c.Rules[rule]++
	}
}

// Want logs the counts and fails where fewer vectors ran than there are known to be.
func (c *Tally) Want(t testing.TB, accepted, refused int) {
	t.Helper()
	t.Logf("%d accepted, %d refused, of which %d may be either; valid ones that rules of ours refuse: %v", c.Accepted, c.Refused, c.Acceptable, c.Rules)
	if c.Accepted < accepted || c.Refused < refused {
		t.Errorf("%d vectors were accepted and %d refused, want at least %d and %d", c.Accepted, c.Refused, accepted, refused)
	}
}
