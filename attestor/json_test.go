package attestor

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseObject(t *testing.T) {
	deep := func(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }
	for _, tt := range []struct {
		name, text string
		want       error
	}{
		{"empty", `{}`, nil},
		{"all kinds", ` { "a" : [ 1 , -2.5e+3, true,false ,null, "x", [], {} ] , "b":{"c":"\u00e9\"\\"} } `, nil},
		{"depth of eight", deep(8), nil},
		{"depth of nine", deep(9), errJSONLarge},
		{"lists that deep", `{"a":` + strings.Repeat("[", 9) + strings.Repeat("]", 9) + `}`, errJSONLarge},
		{"sixteen values", `{"a":[` + strings.Repeat("1,", 13) + `1]}`, nil},
		{"seventeen values", `{"a":[` + strings.Repeat("1,", 14) + `1]}`, errJSONLarge},
		{"not an object", `["a"]`, errJSON},
		{"nothing", ``, errJSON},
		{"two objects", `{}{}`, errJSON},
		{"a comma too many", `{"a":1,}`, errJSON},
		{"half", `{"a":`, errJSON},
		{"no UTF-8", "{\"a\":\"\xff\"}", errJSON},
		{"a name twice", `{"a":1,"b":2,"a":3}`, errJSONKeys},
		{"a name twice inside", `{"x":{"a":1,"a":1}}`, errJSONKeys},
		{"another case", `{"aud":1,"Aud":2}`, errJSONKeys},
		{"another case first", `{"AUD":1,"aud":2}`, errJSONKeys},
		{"two other cases", `{"AUD":1,"Aud":2}`, errJSONKeys},
		{"the Kelvin sign", `{"kid":1,"\u212aid":2}`, errJSONKeys},
		{"a long s", `{"iſs":1,"iss":2}`, errJSONKeys},
		{"an escaped twin", `{"aud":1,"a\u0075d":2}`, errJSONKeys},
		{"names in different objects", `{"a":{"a":{"A":1}}}`, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseObject([]byte(tt.text), 16)
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			if err == nil {
				sameAsUsual(t, []byte(tt.text), got)
			}
		})
	}
}

// sameAsUsual compares what was parsed with what the usual decoder makes of it.
func sameAsUsual(t *testing.T, text []byte, got map[string]any) {
	t.Helper()
	var want map[string]any
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&want); err != nil {
		t.Fatalf("the usual decoder refuses it: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parsed otherwise than usual (-usual +ours):\n%s", diff)
	}
}

// FuzzJSON parses anything: what is accepted is what the usual decoder makes of it, and no object has two names that
// encoding/json would match with one member; what the usual decoder refuses is refused.
//
// threat: A20
func FuzzJSON(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":[1,{"b":null}],"c":"\ud800\n"}`, `{"K":1,"k":1}`, `[[[]]]`, `{"a":-0.1E-2,"b":true}`, "\t{\"a\" :\"\\\\\"}\n", `{"a":1 2}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parseObject(text, 64)
		if err != nil {
			if got != nil || !slices.Contains([]error{errJSON, errJSONKeys, errJSONLarge}, err) {
				t.Errorf("%v, %v", got, err)
			}
			return
		}
		sameAsUsual(t, text, got)
		uniqueNames(t, got)
	})
}

func uniqueNames(t *testing.T, v any) {
	t.Helper()
	switch v := v.(type) {
	case map[string]any:
		names := slices.Collect(maps.Keys(v))
		for i, a := range names {
			for _, b := range names[:i] {
				if strings.EqualFold(a, b) {
					t.Errorf("%q and %q are one name for encoding/json", a, b)
				}
			}
			uniqueNames(t, v[a])
		}
	case []any:
		for _, x := range v {
			uniqueNames(t, x)
		}
	}
}

// FuzzFold compares the fold of names with the standard library's.
func FuzzFold(f *testing.F) {
	f.Add("aud", "AUD")
	f.Add("kid", "\u212aid")
	f.Add("iss", "i\u017fs")
	f.Fuzz(func(t *testing.T, a, b string) {
		if (fold(a) == fold(b)) != strings.EqualFold(a, b) && len(a) < 64 {
			t.Errorf("%q and %q fold to %q and %q", a, b, fold(a), fold(b))
		}
	})
}

func BenchmarkParseObject(b *testing.B) {
	text := []byte(`{"aud":["signet:example.org"],"exp":1800003600,"iat":1800000000,"iss":"https://kubernetes.default.svc.cluster.local","jti":"0b0e6b0a-5b0e-4a54-9f4e-2f7d6a3c1d55","kubernetes.io":{"namespace":"shop","node":{"name":"node-1","uid":"7d9f2d8e-3c53-4d3c-8a56-1b1f6e0f9a01"},"pod":{"name":"cart-5d8c7b9f6-abcde","uid":"5a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"},"serviceaccount":{"name":"cart","uid":"11111111-2222-3333-4444-555555555555"}},"nbf":1800000000,"sub":"system:serviceaccount:shop:cart"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseObject(text, maxTokenValues); err != nil {
			b.Fatal(err)
		}
	}
}
