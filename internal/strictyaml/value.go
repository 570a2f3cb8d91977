package strictyaml

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

var (
	durationType = reflect.TypeFor[time.Duration]()
	rawType      = reflect.TypeFor[Raw]()
)

// value puts n into v, whose type decides what n must be. It walks the tree itself rather than leave it to the YAML
// package, whose messages name Go types, stop at the first unknown key of a struct and know no near miss.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string) {
	if v.Type() == rawType {
		v.Set(reflect.ValueOf(Raw{node: n, path: path}))
		return
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		d.problem(n, path, "there is no value; give one or remove the key")
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(n, v.Elem(), path)
		return
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(n, u, path)
		return
	}
	switch {
	case v.Type() == durationType:
		d.text(n, (*Duration)(v.Addr().Interface().(*time.Duration)), path)
	case v.Kind() == reflect.Struct:
		d.structValue(n, v, path)
	case v.Kind() == reflect.Slice:
		d.sliceValue(n, v, path)
	case v.Kind() == reflect.Map && v.Type().Key().Kind() == reflect.String:
		d.mapValue(n, v, path)
	default:
		d.scalar(n, v, path)
	}
}

func (d *decoder) text(n *yaml.Node, u encoding.TextUnmarshaler, path string) {
	if n.Kind != yaml.ScalarNode {
		d.problem(n, path, "want one value, got %s", kindName(n))
		return
	}
	if err := u.UnmarshalText([]byte(n.Value)); err != nil {
		d.problem(n, path, "%v, got %s", err, quote(n.Value))
	}
}

func (d *decoder) structValue(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.problem(n, path, "want keys with values, got %s", kindName(n))
		return
	}
	fields := fieldsOf(v.Type())
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		index, ok := fields[key.Value]
		if !ok {
			d.unknown(key, fields, path)
			continue
		}
		d.value(value, v.FieldByIndex(index), join(path, key.Value))
	}
}

func (d *decoder) unknown(key *yaml.Node, fields map[string][]int, path string) {
	text := "unknown key " + quote(key.Value)
	if near := nearest(key.Value, fields); near != "" {
		text += fmt.Sprintf(", did you mean %q?", near)
	}
	d.problem(key, path, "%s", text)
}

func (d *decoder) sliceValue(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.problem(n, path, "want a list, got %s", kindName(n))
		return
	}
	s := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		d.value(item, s.Index(i), fmt.Sprintf("%s[%d]", path, i))
	}
	v.Set(s)
}

func (d *decoder) mapValue(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.problem(n, path, "want keys with values, got %s", kindName(n))
		return
	}
	m := reflect.MakeMapWithSize(v.Type(), len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, item := n.Content[i], reflect.New(v.Type().Elem()).Elem()
		d.value(n.Content[i+1], item, join(path, key.Value))
		m.SetMapIndex(reflect.ValueOf(key.Value).Convert(v.Type().Key()), item)
	}
	v.Set(m)
}

// scalar reads a string, bool or number. Quotes make a string: "5" is not a number and "true" not a bool. A string may
// be written without quotes and is taken as it stands, so that 1.10 does not become 1.1.
func (d *decoder) scalar(n *yaml.Node, v reflect.Value, path string) {
	var want string
	ok := n.Kind == yaml.ScalarNode
	switch {
	case v.Kind() == reflect.String:
		want = "a string"
		if ok {
			v.SetString(n.Value)
		}
	case v.Kind() == reflect.Bool:
		want = "true or false"
		ok = ok && n.Tag == "!!bool" && n.Decode(v.Addr().Interface()) == nil
	case v.CanInt() || v.CanUint():
		want = "a whole number " + limits(v)
		ok = ok && n.Tag == "!!int" && n.Decode(v.Addr().Interface()) == nil
	case v.CanFloat():
		want = "a number"
		ok = ok && (n.Tag == "!!int" || n.Tag == "!!float") && n.Decode(v.Addr().Interface()) == nil && finite(v.Float())
	default:
		d.problem(n, path, "cannot be read into a Go %s", v.Type())
		return
	}
	if ok {
		return
	}
	got := kindName(n)
	if n.Kind == yaml.ScalarNode {
		got = quote(n.Value)
	}
	d.problem(n, path, "want %s, got %s", want, got)
}

func finite(f float64) bool { return !math.IsNaN(f) && !math.IsInf(f, 0) }

// limits says which numbers fit into v.
func limits(v reflect.Value) string {
	bits := v.Type().Bits()
	if v.CanUint() {
		return fmt.Sprintf("from 0 to %d", uint64(math.MaxUint64)>>(64-bits))
	}
	return fmt.Sprintf("from %d to %d", int64(math.MinInt64)>>(64-bits), int64(math.MaxInt64)>>(64-bits))
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys with values"
	case yaml.SequenceNode:
		return "a list"
	}
	return "one value"
}

// fieldsOf returns where each key of a struct goes. Embedded structs tagged `yaml:",inline"` lend their keys.
func fieldsOf(t reflect.Type) map[string][]int {
	fields := make(map[string][]int)
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case !f.IsExported() || name == "-":
		case options == "inline" && f.Type.Kind() == reflect.Struct:
			for key, index := range fieldsOf(f.Type) {
				fields[key] = append(slices.Clone(f.Index), index...)
			}
		case name == "":
			fields[strings.ToLower(f.Name)] = f.Index
		default:
			fields[name] = f.Index
		}
	}
	return fields
}

// nearest returns the field that key most likely means, or "" when none is near. Wrong may be one letter and one more in
// each four; a swap of neighbours counts once, letter case not at all.
func nearest(key string, fields map[string][]int) string {
	if len(key) > 2*maxQuoted {
		return ""
	}
	best, least := "", len(key)/4+2
	for name := range fields {
		dist := distance(strings.ToLower(key), strings.ToLower(name))
		if dist < least || dist == least && best != "" && name < best {
			best, least = name, dist
		}
	}
	return best
}

// distance counts insertions, deletions, replacements and swaps of neighbours from a to b.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			replace := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, replace)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
