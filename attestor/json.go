package attestor

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxDepth is how deep objects and lists may nest. A ServiceAccount token nests three deep, a key set four.
const maxDepth = 8

var (
	errJSON      = errors.New("not one JSON object")
	errJSONKeys  = errors.New("ambiguous: an object names one member twice")
	errJSONLarge = errors.New("too wide or too deep")
)

// parseObject parses data as one JSON object that every parser reads in the same way: valid UTF-8, nothing behind it, and
// no two member names of an object that are equal but for case (encoding/json takes the last of such members, others the
// first, and some tell the cases apart). It holds at most maxValues values in all.
//
// Values are string, json.Number, bool, nil, []any and map[string]any.
func parseObject(data []byte, maxValues int) (map[string]any, error) {
	// Decoder.Token is lenient about commas in some places; Valid is not.
	if !utf8.Valid(data) || !json.Valid(data) {
		return nil, errJSON
	}
	p := parser{dec: json.NewDecoder(bytes.NewReader(data)), left: maxValues}
	p.dec.UseNumber()
	v, err := p.value(0)
	if err != nil {
		return nil, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errJSON
	}
	return m, nil
}

type parser struct {
	dec  *json.Decoder
	left int // values that may still come
}

func (p *parser) value(depth int) (any, error) {
	tok, err := p.token()
	if err != nil {
		return nil, err
	}
	if p.left--; p.left < 0 || depth > maxDepth {
		return nil, errJSONLarge
	}
	switch tok {
	case json.Delim('{'):
		return p.object(depth + 1)
	case json.Delim('['):
		return p.list(depth + 1)
	}
	return tok, nil
}

func (p *parser) object(depth int) (map[string]any, error) {
	m := make(map[string]any)
	seen := make(map[string]struct{})
	for p.dec.More() {
		tok, err := p.token()
		if err != nil {
			return nil, err
		}
		name, ok := tok.(string)
		if !ok {
			return nil, errJSON
		}
		folded := fold(name)
		if _, dup := seen[folded]; dup {
			return nil, errJSONKeys
		}
		seen[folded] = struct{}{}
		if m[name], err = p.value(depth); err != nil {
			return nil, err
		}
	}
	_, err := p.token()
	return m, err
}

func (p *parser) list(depth int) ([]any, error) {
	l := []any{}
	for p.dec.More() {
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		l = append(l, v)
	}
	_, err := p.token()
	return l, err
}

// token never returns the decoder's own errors: they quote the input.
func (p *parser) token() (json.Token, error) {
	tok, err := p.dec.Token()
	if err != nil {
		return nil, errJSON
	}
	return tok, nil
}

// fold maps names that are equal under Unicode simple case folding, which is what encoding/json matches members by, to
// one string: in lower case, where there is an ASCII letter for it.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
			least = min(least, f)
		}
		if 'A' <= least && least <= 'Z' {
			least += 'a' - 'A'
		}
		return least
	}, s)
}
