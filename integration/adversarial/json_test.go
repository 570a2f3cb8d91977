package adversarial

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"testing"
)

// object is a JSON object as no library writes one: its members in any order, and any of them twice.
type object []member

type member struct {
	name  string // written as it is, between quotes
	value any
}

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, err
		}
		b.WriteString(`"` + m.name + `":`)
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// objectOf turns maps into objects, all the way down.
func objectOf(m map[string]any) object {
	var o object
	for _, name := range slices.Sorted(maps.Keys(m)) {
		v := m[name]
		if inner, ok := v.(map[string]any); ok {
			v = objectOf(inner)
		}
		o = append(o, member{name, v})
	}
	return o
}

// edit returns a copy of o in which f has replaced the member at path by any number of members.
func (o object) edit(path []string, f func(member) []member) object {
	var out object
	for _, m := range o {
		switch {
		case m.name != path[0]:
			out = append(out, m)
		case len(path) == 1:
			out = append(out, f(m)...)
		default:
			inner, _ := m.value.(object)
			out = append(out, member{m.name, inner.edit(path[1:], f)})
		}
	}
	return out
}

// nested returns a value of lists that is so deep.
func nested(depth int) json.RawMessage {
	return json.RawMessage(slices.Concat(bytes.Repeat([]byte("["), depth), bytes.Repeat([]byte("]"), depth)))
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
