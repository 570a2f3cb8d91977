package attestor

import (
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
	if !utf8.Valid(data) || !json.Valid(data) {
		return nil, errJSON
	}
	p := parser{rest: data, left: maxValues}
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

// parser reads what json.Valid found to be valid: it tells values apart and bounds them, and judges no syntax. Decoder.Token
// does the same in three times the time. FuzzJSON compares it with the usual decoder.
type parser struct {
	rest []byte
	left int // values that may still come
}

// next skips white space, and commas and colons, whose places are known, and returns the first byte of what follows; zero
// at the end.
func (p *parser) next() byte {
	for len(p.rest) > 0 {
		switch c := p.rest[0]; c {
		case ' ', '\t', '\r', '\n', ',', ':':
			p.rest = p.rest[1:]
		default:
			return c
		}
	}
	return 0
}

// take returns the next n bytes.
func (p *parser) take(n int) []byte {
	n = min(n, len(p.rest))
	taken := p.rest[:n]
	p.rest = p.rest[n:]
	return taken
}

func (p *parser) value(depth int) (any, error) {
	if p.left--; p.left < 0 || depth > maxDepth {
		return nil, errJSONLarge
	}
	switch p.next() {
	case '{':
		return p.object(depth + 1)
	case '[':
		return p.list(depth + 1)
	case '"':
		return p.text()
	case 't':
		p.take(len("true"))
		return true, nil
	case 'f':
		p.take(len("false"))
		return false, nil
	case 'n':
		p.take(len("null"))
		return nil, nil
	case 0:
		return nil, errJSON
	default:
		end := 0
		for end < len(p.rest) && strings.IndexByte("+-.0123456789Ee", p.rest[end]) >= 0 {
			end++
		}
		if end == 0 {
			return nil, errJSON
		}
		return json.Number(p.take(end)), nil
	}
}

func (p *parser) object(depth int) (map[string]any, error) {
	p.take(1)
	m := make(map[string]any)
	var seen map[string]struct{} // the folded form of names that have another
	for {
		switch p.next() {
		case '}':
			p.take(1)
			return m, nil
		case '"':
		default:
			return nil, errJSON
		}
		name, err := p.text()
		if err != nil {
			return nil, err
		}
		folded := fold(name)
		_, dup := m[folded]
		_, dup2 := seen[folded]
		if dup || dup2 {
			return nil, errJSONKeys
		}
		if name != folded {
			if seen == nil {
				seen = make(map[string]struct{})
			}
			seen[folded] = struct{}{}
		}
		if m[name], err = p.value(depth); err != nil {
			return nil, err
		}
	}
}

func (p *parser) list(depth int) ([]any, error) {
	p.take(1)
	l := []any{}
	for {
		switch p.next() {
		case ']':
			p.take(1)
			return l, nil
		case 0:
			return nil, errJSON
		}
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		l = append(l, v)
	}
}

// text reads a string. One with escapes is left to the library.
func (p *parser) text() (string, error) {
	plain := true
	for i := 1; i < len(p.rest); i++ {
		switch p.rest[i] {
		case '\\':
			plain = false
			i++
		case '"':
			quoted := p.take(i + 1)
			if plain {
				return string(quoted[1:i]), nil
			}
			var s string
			if err := json.Unmarshal(quoted, &s); err != nil {
				return "", errJSON // its own error quotes the input
			}
			return s, nil
		}
	}
	return "", errJSON
}

// fold maps names that are equal under Unicode simple case folding, which is what encoding/json matches members by, to
// one string: in lower case, where there is an ASCII letter for it.
func fold(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r >= utf8.RuneSelf || 'A' <= r && r <= 'Z' }) {
		return s // nothing folds to less than a lower-case letter but its upper-case one
	}
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
