package adversarial

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// seed makes every run the same one.
func seed(n uint64) *rand.Rand { return rand.New(rand.NewPCG(0x5167e7, n)) }

// token returns a fresh good token of the workload.
func (r *rig) token(change ...func(*attestortest.Draft)) []byte {
	r.t.Helper()
	return r.Evidence(r.pod, api.WorkloadAudience(r.TD), time.Hour, change...).Data
}

// TestTokenText changes tokens as text: what is no compact JWS, in its one spelling, is refused before its claims count.
//
// threat: A20, A21, A22, CVE-2025-30204
func TestTokenText(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		ask := func(row, name string, token []byte, want ...api.Reason) {
			t.Helper()
			r.ask(variant{row: row, name: name, item: r.item(token), want: want})
		}
		good := r.token()
		ask("A20", "untouched", good)
		rnd := seed(1)
		for i := range 400 { // a bit in the middle of a text that must not change
			at, bit := rnd.IntN(len(good)), byte(1)<<rnd.IntN(7)
			bad := bytes.Clone(good)
			bad[at] ^= bit
			ask("A20", fmt.Sprintf("bit %d of byte %d, number %d", bit, at, i), bad,
				api.TokenMalformed, api.TokenSignature, api.TokenAmbiguous, api.IssuerUnknown)
		}
		for i := range 100 {
			ask("A20", fmt.Sprintf("cut, number %d", i), good[:rnd.IntN(len(good)-1)], api.TokenMissing, api.TokenMalformed, api.TokenSignature)
		}
		for i := range 60 {
			at, b := rnd.IntN(len(good)), byte(rnd.IntN(256))
			ask("A20", fmt.Sprintf("byte %#x before byte %d, number %d", b, at, i), slices.Insert(bytes.Clone(good), at, b),
				api.TokenMalformed, api.TokenSignature, api.TokenAmbiguous, api.IssuerUnknown)
		}
		for name, token := range sorted(spellings(good)) {
			ask("A20", name, token, api.TokenMalformed, api.TokenAmbiguous)
		}
		for name, token := range sorted(beside(good)) {
			ask("A22", name, token, api.TokenAmbiguous, api.TokenMalformed)
		}
		for _, n := range []int{1, 3, 4, 10, 100, 1000, api.MaxTokenBytes} {
			ask("A21", fmt.Sprint(n, " dots"), bytes.Repeat([]byte("."), n), api.TokenMalformed)
		}
		// CVE-2025-30204, GO-2025-4193: what is too large is not even looked at.
		for _, n := range []int{api.MaxTokenBytes + 1, 100_000, 1 << 20, 2 << 20} {
			ask("A21", fmt.Sprint(n, " dots"), bytes.Repeat([]byte("."), n), api.TokenTooLarge)
			ask("A21", fmt.Sprint(n, " letters"), bytes.Repeat([]byte("a"), n), api.TokenTooLarge)
			ask("A21", fmt.Sprint("a good token and ", n, " spaces"), append(bytes.Clone(good), bytes.Repeat([]byte(" "), n)...), api.TokenTooLarge)
		}
		ask("A20", "nothing", nil, api.TokenMissing)
		r.tell(600)
	})
}

// spellings are other texts that a lenient decoder would take for token.
func spellings(token []byte) map[string][]byte {
	all := map[string][]byte{}
	parts := strings.Split(string(token), ".")
	for i, name := range []string{"header", "payload", "signature"} {
		with := func(how, s string) {
			p := slices.Clone(parts)
			p[i] = s
			all[name+", "+how] = []byte(strings.Join(p, "."))
		}
		raw, _ := base64.RawURLEncoding.DecodeString(parts[i])
		with("padded", parts[i]+"=")
		with("padded twice", parts[i]+"==")
		with("standard base64", "+"+parts[i][1:])
		with("standard base64 slash", parts[i][:1]+"/"+parts[i][2:])
		with("percent", parts[i]+"%3D")
		with("newline within", parts[i][:4]+"\n"+parts[i][4:])
		with("carriage return within", parts[i][:4]+"\r\n"+parts[i][4:])
		with("in hex", fmt.Sprintf("%x.", raw))
		with("empty", "")
		with("one letter", parts[i]+strings.Repeat("A", 5-len(parts[i])%4))
		with("not ASCII", parts[i]+"ä")
		if len(raw)%3 != 0 { // the last character has spare bits
			last := strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", parts[i][len(parts[i])-1])
			with("spare bits", parts[i][:len(parts[i])-1]+string("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[last|1]))
		}
	}
	all["JSON serialization"] = fmt.Appendf(nil, `{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2])
	all["JSON serialization, general"] = fmt.Appendf(nil, `{"payload":%q,"signatures":[{"protected":%q,"signature":%q}]}`, parts[1], parts[0], parts[2])
	all["JWE"] = []byte(strings.Join(append(parts, "AAAA", "AAAA"), "."))
	all["reversed"] = []byte(parts[2] + "." + parts[1] + "." + parts[0])
	all["PEM"] = []byte("-----BEGIN JWT-----\n" + string(token) + "\n-----END JWT-----\n")
	return all
}

// beside is a good token with something that another reader would take for the token instead.
func beside(token []byte) map[string][]byte {
	s := string(token)
	return map[string][]byte{
		"Bearer": []byte("Bearer " + s), "Bearer twice": []byte("Bearer Bearer " + s), "Bearer of two": []byte("Bearer " + s + ", Bearer " + s),
		"newline": []byte(s + "\n"), "two newlines": []byte(s + "\n\n"), "carriage return": []byte(s + "\r\n"), "NUL": []byte(s + "\x00"), "NUL before": []byte("\x00" + s),
		"space": []byte(s + " "), "tab": []byte("\t" + s), "comma": []byte(s + ","), "two with a comma": []byte(s + "," + s), "two with a space": []byte(s + " " + s),
		"two with a newline": []byte(s + "\n" + s), "two with NUL": []byte(s + "\x00" + s), "DEL": []byte(s + "\x7f"), "BOM": []byte("\ufeff" + s), "quotes": []byte(`"` + s + `"`),
		"semicolon": []byte(s + ";x"), "vertical tab": []byte(s + "\v"), "no-break space": []byte(s + "\u00a0"),
	}
}

// TestTokenHeader says in the header what must not decide anything.
//
// threat: A20
func TestTokenHeader(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		attacker, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
		if err != nil {
			t.Fatal(err)
		}
		stolen := attacker.Draft(r.pod, "", time.Hour).Sign
		ask := func(name string, token []byte, want []api.Reason, harmless string) {
			t.Helper()
			r.ask(variant{row: "A20", name: name, item: r.item(token), want: want, harmless: harmless})
		}
		signature := one(api.TokenSignature)
		either := []api.Reason{api.TokenSignature, api.TokenMalformed}
		for i, alg := range []any{"none", "None", "nOnE", "NONE", "", "HS256", "HS384", "HS512", "hs256", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
			"ES384", "ES512", "ES256K", "es256", "ES256 ", "ES256\x00", "EdDSA", "Ed25519", "ML-DSA-44", "dir", "A128KW", "PBES2-HS256+A128KW", "RSA-OAEP", "RSA1_5",
			nil, 256, true, []any{"ES256"}, map[string]any{"ES256": true}} {
			name := fmt.Sprintf("alg %d %v", i, alg)
			ask(name, r.token(attestortest.Header("alg", alg)), either, "")
			unsigned := r.token(attestortest.Header("alg", alg), func(d *attestortest.Draft) { d.Sign = func([]byte) ([]byte, error) { return []byte{0}, nil } })
			ask(name+", not signed", unsigned, either, "")
			ask(name+", empty signature", unsigned[:bytes.LastIndexByte(unsigned, '.')+1], either, "")
			ask(name+", signed by somebody", r.token(attestortest.Header("alg", alg), func(d *attestortest.Draft) { d.Sign = stolen }), either, "")
		}
		for _, secret := range [][]byte{r.Tokens.JWKS(), []byte(r.Tokens.KeyID()), {}, []byte("secret")} { // the public key as a MAC's
			for _, alg := range []string{"HS256", "HS384", "HS512", "ES256"} {
				ask(fmt.Sprintf("%s under %.8x", alg, secret), r.token(attestortest.Header("alg", alg), func(d *attestortest.Draft) {
					d.Sign = func(in []byte) ([]byte, error) {
						mac := hmac.New(sha256.New, secret)
						mac.Write(in)
						return mac.Sum(nil), nil
					}
				}), signature, "")
			}
		}
		for i, kid := range []any{"", nil, 1, true, []any{r.Tokens.KeyID()}, "../../etc/passwd", "/dev/null", "file:///etc/passwd", "http://169.254.169.254/latest",
			"' OR 1=1 --", "*", "0", strings.Repeat("k", 257), strings.Repeat("k", 600), "\x00", r.Tokens.KeyID() + "\x00", r.Tokens.KeyID() + " ", upper(r.Tokens.KeyID()),
			r.Tokens.KeyID()[:10], attacker.KeyID()} {
			name := fmt.Sprintf("kid %d %s", i, clip(fmt.Sprint(kid)))
			ask(name, r.token(attestortest.Header("kid", kid)), signature, "")
			ask(name+", signed by somebody", r.token(attestortest.Header("kid", kid), func(d *attestortest.Draft) { d.Sign = stolen }), signature, "")
		}
		ask("signed by somebody", r.token(func(d *attestortest.Draft) { d.Sign = stolen }), signature, "")
		var jwks struct{ Keys []map[string]any }
		if err := json.Unmarshal(attacker.JWKS(), &jwks); err != nil {
			t.Fatal(err)
		}
		for name, v := range sorted(map[string]any{
			"jwk": jwks.Keys[0], "jku": "https://evil.test/jwks", "x5u": "https://evil.test/cert", "x5c": []any{"AAAA"}, "x5t": "AAAA", "x5t#S256": "AAAA", "crit": []any{},
			"b64": false, "zip": "DEF", "enc": "A128GCM", "cty": "JWT", "epk": jwks.Keys[0], "p2c": 1 << 30, "p2s": "AAAA", "apu": "AAAA", "iv": "AAAA", "tag": "AAAA", "url": "https://evil.test",
			"nonce": "x", "exp": 1, "Alg": "ES256", "Kid": "x", "unknown": nil,
		}) {
			want := signature
			if name == "Alg" || name == "Kid" {
				want = one(api.TokenMalformed) // twice, for a reader that does not tell cases apart
			}
			ask("member "+name, r.token(attestortest.Header(name, v)), want, "")
			ask("member "+name+", signed by somebody", r.token(attestortest.Header(name, v), func(d *attestortest.Draft) {
				d.Sign, d.Header["kid"] = stolen, attacker.KeyID()
			}), want, "")
		}
		for i, crit := range []any{[]any{"exp"}, []any{"b64"}, []any{"alg"}, "exp", nil} {
			ask(fmt.Sprintf("crit %d", i), r.token(attestortest.Header("crit", crit)), signature, "")
		}
		for _, typ := range []any{"JWT", "JOSE"} {
			ask(fmt.Sprint("typ ", typ), r.token(attestortest.Header("typ", typ)), nil, "typ says what it is")
		}
		for i, typ := range []any{"", "jwt", "at+jwt", "wit+jwt", "JWE", "secevent+jwt", nil, 1, []any{"JWT"}} {
			ask(fmt.Sprintf("typ %d %v", i, typ), r.token(attestortest.Header("typ", typ)), one(api.TokenMalformed), "")
		}
		for name, raw := range sorted(rawHeaders(r.Tokens.KeyID())) {
			ask("header "+name, r.token(func(d *attestortest.Draft) { d.RawHeader = raw }), either, "")
		}
		r.tell(250)
	})
}

func rawHeaders(kid string) map[string][]byte {
	good := fmt.Sprintf(`{"alg":"ES256","kid":%q}`, kid)
	all := rawObjects(good)
	all["alg twice"] = fmt.Appendf(nil, `{"alg":"ES256","kid":%q,"alg":"none"}`, kid)
	all["alg twice, the other first"] = fmt.Appendf(nil, `{"alg":"none","kid":%q,"alg":"ES256"}`, kid)
	all["kid twice"] = fmt.Appendf(nil, `{"alg":"ES256","kid":%q,"kid":"x"}`, kid)
	all["above 1 KiB"] = []byte(good[:len(good)-1] + strings.Repeat(" ", 1100) + "}")
	all["above 10 KiB"] = []byte(good[:len(good)-1] + strings.Repeat(" ", 10<<10) + "}")
	return all
}

// rawObjects are texts around a good JSON object that are not that object alone.
func rawObjects(good string) map[string][]byte {
	return map[string][]byte{
		"nothing": {}, "null": []byte("null"), "number": []byte("1"), "text": []byte(`"x"`), "list": []byte("[" + good + "]"), "empty object": []byte("{}"),
		"two objects": []byte(good + good), "garbage behind": []byte(good + "x"), "NUL behind": []byte(good + "\x00"), "BOM": []byte("\ufeff" + good),
		"comment": []byte(good[:1] + "/**/" + good[1:]), "comma at the end": []byte(good[:len(good)-1] + ",}"), "comma at the start": []byte("{," + good[1:]),
		"single quotes": []byte(strings.ReplaceAll(good, `"`, "'")), "not closed": []byte(good[:len(good)-1]), "closed twice": []byte(good + "}"),
		"invalid UTF-8": []byte(good[:len(good)-1] + ",\"x\":\"\xff\"}"), "NaN": []byte(good[:len(good)-1] + `,"x":NaN}`), "bare word": []byte(good[:len(good)-1] + `,"x":y}`),
		"UTF-16": bytes.ReplaceAll([]byte(good), []byte("{"), []byte("{\x00")), "control character": []byte(good[:len(good)-1] + ",\"x\":\"\n\"}"), "semicolon": []byte(good + ";"),
		"leading zero": []byte(good[:len(good)-1] + `,"x":01}`), "hex": []byte(good[:len(good)-1] + `,"x":0x1}`), "colon missing": []byte(good[:len(good)-1] + `,"x" 1}`),
		"10000 deep": slices.Concat([]byte(good[:len(good)-1]+`,"x":`), nested(5000), []byte("}")),
	}
}

// threat: A20, A21, A23
func TestTokenParts(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		claims := string(marshal(t, r.Tokens.Draft(r.pod, api.WorkloadAudience(r.TD), time.Hour).Claims))
		for name, raw := range sorted(rawObjects(claims)) {
			want := []api.Reason{api.TokenMalformed}
			if name == "empty object" {
				want = one(api.IssuerUnknown)
			}
			r.ask(variant{row: "A21", name: "payload " + name, item: r.item(r.sign(raw)), want: want})
		}
		for name, extra := range sorted(map[string]string{"space": " ", "newline": "\n", "tab": "\t"}) {
			r.ask(variant{row: "A20", name: name + " around the payload", item: r.item(r.sign([]byte(extra + claims + extra))), harmless: "white space in signed JSON"})
		}
		for name, extra := range sorted(map[string]string{"unknown": `"x":1`, "jku": `"jku":"https://evil.test"`, "azp": `"azp":"x"`, "lone surrogate": `"x":"\ud800"`}) {
			r.ask(variant{row: "A20", name: "a claim more: " + name, item: r.item(r.sign([]byte(claims[:len(claims)-1] + "," + extra + "}"))), harmless: "a claim that means nothing here"})
		}
		// Header, payload and signature of three good tokens, in every mixture.
		neighbour := r.Pod(stranger, "db-0", "db", here)
		tokens := [][]byte{
			r.token(),
			r.Evidence(neighbour, api.WorkloadAudience(r.TD), time.Hour).Data,
			r.Evidence(r.agentPod, api.AgentAudience(r.TD), time.Hour).Data,
		}
		for i := range 27 {
			h, p, s := i%3, i/3%3, i/9
			part := func(token, part int) []byte { return bytes.Split(tokens[token], []byte("."))[part] }
			v := variant{row: "A20", name: fmt.Sprintf("header %d, payload %d, signature %d", h, p, s), want: one(api.TokenSignature)}
			v.item = r.item(bytes.Join([][]byte{part(h, 0), part(p, 1), part(s, 2)}, []byte(".")))
			switch {
			case p == s && p == 0:
				v.want, v.harmless = nil, "the headers of one issuer are equal"
			case p == s && p == 1: // the neighbour's own good token, with a request signed by the workload's key
				v.want, v.is = one(api.KeyReused), ""
			case p == s:
				v.want = one(api.TokenAudience)
			}
			r.ask(v)
		}
		for i, kind := range []string{"", "k8s", "K8S-SERVICEACCOUNT", "k8s-serviceaccount ", "k8s-serviceaccount\x00", "x509", "jwt", strings.Repeat("k", 1000)} {
			item := r.item(r.token())
			item.Evidence.Kind = kind
			r.ask(variant{row: "A20", name: fmt.Sprint("kind of evidence ", i), item: item, want: one(api.EvidenceKind)})
		}
		r.tell(60)
	})
}

// TestDoor asks as an agent, with nothing but a token: AttestAgent is open to whoever can connect.
//
// threat: A01, A18, A20, A21, A22
func TestDoor(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		fresh := func(change ...func(*attestortest.Draft)) []byte {
			return r.Evidence(r.agentPod, api.AgentAudience(r.TD), time.Hour, change...).Data
		}
		ask := func(row, name string, token []byte, want ...api.Reason) {
			t.Helper()
			item := &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, Csr: r.csr}
			r.ask(variant{row: row, name: name, item: item, want: want, door: true})
		}
		good, rnd := fresh(), seed(2)
		for i := range 100 {
			bad := bytes.Clone(good)
			bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(7)
			ask("A20", fmt.Sprint("a bit, number ", i), bad, api.TokenMalformed, api.TokenSignature, api.TokenAmbiguous, api.IssuerUnknown)
		}
		for name, token := range sorted(spellings(good)) {
			ask("A20", name, token, api.TokenMalformed, api.TokenAmbiguous)
		}
		for name, token := range sorted(beside(good)) {
			ask("A22", name, token, api.TokenAmbiguous, api.TokenMalformed)
		}
		for what, s := range sorted(texts(catest.AgentNS)) {
			ask("A18", "namespace "+what, fresh(func(d *attestortest.Draft) {
				d.Kubernetes()["namespace"], d.Claims["sub"] = s, "system:serviceaccount:"+s+":"+catest.AgentSA
			}), api.SubjectMalformed, api.NotAnAgent)
		}
		for what, s := range sorted(texts(api.AgentAudience(r.TD))) {
			ask("A01", "audience "+what, fresh(attestortest.Audiences(s)), api.TokenAudience)
			if s != "" {
				ask("A02", "ours and "+what, fresh(attestortest.Audiences(api.AgentAudience(r.TD), s)), api.TokenAudienceNotExclusive)
			}
		}
		ask("A01", "a workload's", r.token(), api.TokenAudience)
		ask("A21", "1 MiB", bytes.Repeat([]byte("a"), 1<<20), api.TokenTooLarge)
		r.tell(250)
	})
}
