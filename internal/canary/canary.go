// Package canary finds secrets where none belong. Tests put Marker into every secret that they make up, and search what
// was said, written and answered for it and for the secrets themselves, in every form in which bytes lie in a text; the
// program that runs all tests searches all of their output for Marker.
package canary

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"
)

// Marker is in every secret of a test. Nothing else contains it; its parts are joined so that no source holds it whole.
const Marker = "the-canary" + "-7d1f93" + "-must-stay-inside"

// minBytes is the length below which a form of a secret is not searched for: it would be found by chance.
const minBytes = 12

// Forms returns the ways in which a secret can lie in a text: as it is, in hex, in base64 at any offset, and as Go prints
// bytes. A secret of fewer than 12 bytes has none.
func Forms(secret []byte) [][]byte {
	if len(secret) < minBytes {
		return nil
	}
	lower := hex.EncodeToString(secret)
	all := [][]byte{bytes.Clone(secret), []byte(lower), []byte(strings.ToUpper(lower)), decimal(secret)}
	for skip := range 3 {
		rest := secret[skip:]
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			text := enc.EncodeToString(rest)
			all = append(all, []byte(text[:len(rest)*8/6])) // the last letter may depend on what follows
		}
	}
	return all
}

// decimal is the inside of what %v makes of bytes.
func decimal(secret []byte) []byte {
	var out []byte
	for i, b := range secret {
		if i > 0 {
			out = append(out, ' ')
		}
		for d := byte(100); d > 0; d /= 10 {
			if b >= d || d == 1 {
				out = append(out, '0'+b/d%10)
			}
		}
	}
	return out
}

// Search looks for secrets by their names. The zero value knows none.
type Search struct {
	names []string
	forms [][]byte
}

// Add has the search look for every form of a secret.
func (s *Search) Add(name string, secret []byte) {
	for _, form := range Forms(secret) {
		s.names, s.forms = append(s.names, name), append(s.forms, form)
	}
}

// Find returns the names of the secrets that are in the text, each once, also where lines break them, as those of PEM do.
func (s *Search) Find(text []byte) []string {
	var found []string
	joined := breaks.ReplaceAll(text, nil)
	for i, form := range s.forms {
		if (len(found) == 0 || found[len(found)-1] != s.names[i]) && (bytes.Contains(text, form) || bytes.Contains(joined, form)) {
			found = append(found, s.names[i])
		}
	}
	return found
}

// breaks are the ends of lines with what indents the next, as they are and as a quoted text shows them.
var breaks = regexp.MustCompile(`(\s|\\+[rnt])*(\n|\\+n)(\s|\\+t)*`)

// Longest is the length of the longest form, with room for how it may be broken: of what was read in pieces, so much less
// one has to be kept for the next.
func (s *Search) Longest() int {
	longest := 0
	for _, form := range s.forms {
		longest = max(longest, 2*len(form))
	}
	return longest
}
