package adversarial

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"testing"
)

// node is one element of DER, with what it is called in the name of a variant.
type node struct {
	path     string
	tag      byte
	content  []byte // of a primitive one
	children []*node
	compound bool
}

// parse takes DER apart, through the octet strings and bit strings that hold more DER too where inside says so.
func parse(t testing.TB, der []byte, path string, inside func(path string) int) []*node {
	t.Helper()
	var all []*node
	for i := 0; len(der) > 0; i++ {
		var v asn1.RawValue
		rest, err := asn1.Unmarshal(der, &v)
		if err != nil {
			t.Fatal(err)
		}
		n := &node{path: fmt.Sprintf("%s/%d", path, i), tag: v.FullBytes[0], compound: v.IsCompound}
		if skip := inside(n.path); v.IsCompound || skip >= 0 {
			skip = max(skip, 0)
			n.content = bytes.Clone(v.Bytes[:skip]) // the count of spare bits
			n.children = parse(t, v.Bytes[skip:], n.path, inside)
		} else {
			n.content = bytes.Clone(v.Bytes)
		}
		all = append(all, n)
		der = rest
	}
	return all
}

// encode writes the tree back; edit may replace what stands for a node, and returns nil to leave it.
func (n *node) encode(edit func(*node, []byte) []byte) []byte {
	body := bytes.Clone(n.content)
	for _, c := range n.children {
		body = append(body, c.encode(edit)...)
	}
	if out := edit(n, body); out != nil {
		return out
	}
	return tlv(n.tag, body)
}

func (n *node) walk(f func(*node)) {
	f(n)
	for _, c := range n.children {
		c.walk(f)
	}
}

// tlv is one element in DER.
func tlv(tag byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return slices.Concat([]byte{tag}, lengthOf(len(body)), body)
}

func lengthOf(n int) []byte {
	if n < 0x80 {
		return []byte{byte(n)}
	}
	b := big.NewInt(int64(n)).Bytes()
	return append([]byte{0x80 | byte(len(b))}, b...)
}

// breakages are ways to write an element wrong, or as another. A nil result stands for an element that is not there.
func breakages() map[string]func(tag byte, body []byte) []byte {
	raw := func(tag byte, length []byte, body []byte) []byte { return slices.Concat([]byte{tag}, length, body) }
	long := func(n, size int) []byte {
		return append([]byte{0x80 | byte(size)}, big.NewInt(int64(n)).FillBytes(make([]byte, size))...)
	}
	all := map[string]func(tag byte, body []byte) []byte{
		"left out":          func(byte, []byte) []byte { return []byte{} },
		"twice":             func(tag byte, body []byte) []byte { return slices.Concat(tlv(tag, body), tlv(tag, body)) },
		"empty":             func(tag byte, _ []byte) []byte { return tlv(tag) },
		"a null behind":     func(tag byte, body []byte) []byte { return slices.Concat(tlv(tag, body), []byte{5, 0}) },
		"a null before":     func(tag byte, body []byte) []byte { return slices.Concat([]byte{5, 0}, tlv(tag, body)) },
		"a null within":     func(tag byte, body []byte) []byte { return tlv(tag, body, []byte{5, 0}) },
		"a byte within":     func(tag byte, body []byte) []byte { return tlv(tag, body, []byte{0}) },
		"end of contents":   func(tag byte, body []byte) []byte { return slices.Concat(tlv(tag, body), []byte{0, 0}) },
		"a byte less":       func(tag byte, body []byte) []byte { return tlv(tag, body[:max(0, len(body)-1)]) },
		"first byte gone":   func(tag byte, body []byte) []byte { return tlv(tag, body[min(1, len(body)):]) },
		"length too short":  func(tag byte, body []byte) []byte { return raw(tag, lengthOf(max(0, len(body)-1)), body) },
		"length too long":   func(tag byte, body []byte) []byte { return raw(tag, lengthOf(len(body)+1), body) },
		"length not least":  func(tag byte, body []byte) []byte { return raw(tag, long(len(body), 3), body) },
		"length of 4 bytes": func(tag byte, body []byte) []byte { return raw(tag, long(len(body), 4), body) },
		"length of 8 bytes": func(tag byte, body []byte) []byte { return raw(tag, long(len(body), 8), body) },
		"length 2^31":       func(tag byte, body []byte) []byte { return raw(tag, []byte{0x84, 0x80, 0, 0, 0}, body) },
		"length 2^32-1":     func(tag byte, body []byte) []byte { return raw(tag, []byte{0x84, 0xff, 0xff, 0xff, 0xff}, body) },
		"length 2^63":       func(tag byte, body []byte) []byte { return raw(tag, []byte{0x88, 0x80, 0, 0, 0, 0, 0, 0, 0}, body) },
		"length of 127":     func(tag byte, body []byte) []byte { return raw(tag, []byte{0xff}, body) },
		"indefinite length": func(tag byte, body []byte) []byte { return slices.Concat(raw(tag, []byte{0x80}, body), []byte{0, 0}) },
		"tag of many bytes": func(tag byte, body []byte) []byte {
			return slices.Concat([]byte{tag | 0x1f, 0x81, 0x01}, lengthOf(len(body)), body)
		},
		"constructed": func(tag byte, body []byte) []byte { return tlv(tag^0x20, body) },
		"in pieces":   func(tag byte, body []byte) []byte { return tlv(tag|0x20, tlv(tag&^0x20, body)) },
		"wrapped":     func(tag byte, body []byte) []byte { return tlv(0x30, tlv(tag, body)) },
		"1000 deep":   func(tag byte, body []byte) []byte { return deep(1000, tlv(tag, body)) },
		"all zero":    func(tag byte, body []byte) []byte { return tlv(tag, make([]byte, len(body))) },
		"all ones":    func(tag byte, body []byte) []byte { return tlv(tag, bytes.Repeat([]byte{0xff}, len(body))) },
	}
	for _, other := range []byte{1, 2, 3, 4, 5, 6, 12, 19, 22, 30, 0x30, 0x31, 0x80, 0x86, 0xa0, 0xa1, 0xbf, 0xff} {
		all[fmt.Sprintf("tag %#x", other)] = func(tag byte, body []byte) []byte {
			if tag == other {
				return tlv(tag+1, body)
			}
			return tlv(other, body)
		}
	}
	return all
}

func deep(n int, der []byte) []byte {
	for range n {
		der = tlv(0x30, der)
	}
	return der
}
