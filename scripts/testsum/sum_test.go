package main

import (
	"bytes"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/signet-ca/signet/internal/canary"
)

func TestSum(t *testing.T) {
	for _, tc := range []struct {
		name, events, want string
	}{
		{"nothing", "", "0 passed, 0 failed, 0 skipped\n"},
		{"quiet about what passed", `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"noise\n"}
{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`, "ok  \tp\t0.1s\n2 passed, 0 failed, 0 skipped\n"},
		{"loud about what failed", `{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Test":"A","Output":"a_test.go:1: wrong\n"}
{"Action":"output","Package":"p","Test":"A","Output":"--- FAIL: A\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, "a_test.go:1: wrong\n--- FAIL: A\nFAIL\tp\t0.1s\n1 passed, 1 failed, 0 skipped\n"},
		{"does not build", `{"ImportPath":"p","Action":"build-output","Output":"./p.go:1: undefined\n"}
{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
{"Action":"fail","Package":"p","FailedBuild":"p"}
`, "./p.go:1: undefined\nFAIL\tp [build failed]\n0 passed, 1 failed, 0 skipped\n"},
		{"panics", `{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Test":"A","Output":"panic: oh\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, "FAIL\tp\t0.1s\npanic: oh\n0 passed, 1 failed, 0 skipped\n"},
		{"fails, then hangs", `{"Action":"start","Package":"p"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"B","Output":"panic: test timed out\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, "FAIL\tp\t0.1s\npanic: test timed out\n0 passed, 2 failed, 0 skipped\n"},
		{"cut off", `{"Action":"start","Package":"p"}
{"Action":"pass","Package":"p","Test":"A"}
`, "FAIL\tp ended without a verdict\n1 passed, 1 failed, 0 skipped\n"},
		{"skips by reason", `{"Action":"output","Package":"p","Test":"A","Output":"=== RUN   A\n"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:7: no Envoy\n"}
{"Action":"output","Package":"p","Test":"A","Output":"--- SKIP: A (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"output","Package":"q","Test":"B","Output":"    b_test.go:9: no Envoy\n"}
{"Action":"skip","Package":"q","Test":"B"}
{"Action":"skip","Package":"r"}
`, "skipped: no Envoy: A (p), B (q)\n0 passed, 0 failed, 2 skipped\n"},
		{"a secret, of a test that passes", `{"Action":"output","Package":"p","Test":"A","Output":"got ` + canary.Marker[:9] + `"}
{"Action":"output","Package":"p","Test":"A","Output":"` + canary.Marker[9:] + `\n"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"output","Package":"q","Output":"` + base64.StdEncoding.EncodeToString([]byte(`{"a":"`+canary.Marker+`"}`)) + `\n"}
{"Action":"output","Package":"r","Output":"` + canary.Marker[1:] + `\n"}
`, "FAIL\tp A printed a secret: the marker that every token and key of the tests carries\nFAIL\tq printed a secret: the marker that every token and key of the tests carries\n1 passed, 2 failed, 0 skipped\n"},
		{"not an event", "go: downloading x\n", "go: downloading x\n0 passed, 0 failed, 0 skipped\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			s := newSum(&out)
			if err := s.read(strings.NewReader(tc.events)); err != nil {
				t.Fatal(err)
			}
			s.close()
			if out.String() != tc.want {
				t.Errorf("told\n%s\nwant\n%s", out.String(), tc.want)
			}
		})
	}
}
