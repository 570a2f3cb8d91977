package adversarial

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestRequestNames asks for names: every kind of name alone, in every pair, and around the right one.
//
// threat: C02, C03
func TestRequestNames(t *testing.T) {
	foreign := "spiffe://example.org/ns/" + stranger + "/sa/db"
	kinds := map[string][]byte{
		"own": ownURI, "foreign": general(6, foreign), "other name": tlv(0xa0, []byte{6, 3, 0x2a, 3, 4}, tlv(0xa0, tlv(12, []byte("x")))), "email": general(1, "a@example.org"),
		"dns": general(2, stranger+".svc"), "wildcard": general(2, "*"), "x400": tlv(0xa3), "directory": tlv(0xa4, tlv(0x30)), "edi": tlv(0xa5, tlv(0x81, []byte("x"))),
		"ip": tlv(0x87, []byte{10, 0, 0, 1}), "ip6": tlv(0x87, make([]byte, 16)), "registered": tlv(0x88, []byte{0x2a, 3}), "ninth": general(9, "x"), "URI as a SEQUENCE": tlv(0xa6, ownURI),
		"empty dns": general(2, ""), "UTF-8": tlv(12, []byte(webID)),
	}
	withCSRs(t, 250, func(t *testing.T, a csrAsker) {
		ask := func(name string, key []byte, names ...string) {
			t.Helper()
			row, uris, others := "C02", 0, 0
			for _, n := range names {
				if n == "own" || n == "foreign" {
					uris++
				} else {
					others++
				}
			}
			want, harmless := []api.Reason{api.CSRExtraSAN, api.CSRURICount, api.CSRMalformed}, ""
			switch {
			case others > 0:
			case uris == 1 && names[0] == "own":
				want = nil
			case uris == 1:
				want = one(api.IDMismatch)
			default:
				row, want = "C03", one(api.CSRURICount)
			}
			a.ask(row, name, key, harmless, want...)
		}
		keys := make([]string, 0, len(kinds))
		for name := range sorted(kinds) {
			keys = append(keys, name)
			ask(name, request(t, a.key, extensions(san(kinds[name]))), name)
		}
		for _, x := range keys {
			for _, y := range keys {
				ask(x+" and "+y, request(t, a.key, extensions(san(kinds[x], kinds[y]))), x, y)
			}
		}
		for _, n := range []int{3, 10, 500} { // 20 000 of them do not fit in what is read at all
			a.ask("C03", fmt.Sprint(n, " of the own"), request(t, a.key, extensions(san(slices.Repeat([][]byte{ownURI}, n)...))), "",
				api.CSRURICount, api.CSRTooLarge)
		}
		a.ask("C03", "20000 names", request(t, a.key, extensions(san(slices.Repeat([][]byte{ownURI}, 20_000)...))), "", api.CSRTooLarge)
		a.ask("C03", "no names", request(t, a.key, extensions(san())), "", api.CSRMalformed)
		for name, der := range sorted(map[string][]byte{
			"none": request(t, a.key), "no extensions": request(t, a.key, extensions()), "critical": request(t, a.key, extensions(tlv(0x30, oidSAN, []byte{1, 1, 0xff}, tlv(4, tlv(0x30, ownURI))))),
		}) {
			a.ask("C03", name, der, "it names nothing, or itself")
		}
	})
}

// TestRequestIDs asks for SPIFFE IDs that are none, and for those of others.
//
// threat: C04, C05, C06, C07, C08, C09, C10, C11, C12, CVE-2021-27098, CVE-2024-45341, B02
func TestRequestIDs(t *testing.T) {
	const td = "spiffe://example.org"
	malformed := map[string]string{
		"C04 upper case of the trust domain": "spiffe://Example.org/ns/shop/sa/web", "C04 upper case of the scheme": "SPIFFE://example.org/ns/shop/sa/web", "C04 punycode look-alike": "spiffe://еxample.org/ns/shop/sa/web",
		"C05 port": "spiffe://example.org:443/ns/shop/sa/web", "C05 empty port": "spiffe://example.org:/ns/shop/sa/web", "C06 user": "spiffe://a@example.org/ns/shop/sa/web", "C06 user and password": "spiffe://a:b@example.org/ns/shop/sa/web",
		"C06 empty user": "spiffe://@example.org/ns/shop/sa/web", "C07 query": webID + "?x=y", "C07 empty query": webID + "?", "C08 fragment": webID + "#x", "C08 empty fragment": webID + "#",
		"C09 percent": td + "/ns/shop/sa/%77eb", "C09 percent dot": td + "/ns/shop/%2e%2e/web", "C09 percent slash": td + "/ns%2fshop/sa/web", "C09 percent in the trust domain": "spiffe://ex%61mple.org/ns/shop/sa/web", "C09 percent NUL": webID + "%00",
		"C10 dot": td + "/ns/./shop/sa/web", "C10 two dots": td + "/ns/x/../shop/sa/web", "C10 empty segment": td + "/ns//shop/sa/web", "C10 slashes": td + "//ns/shop/sa/web", "C10 dots at the end": webID + "/..", "C10 dot at the end": webID + "/.",
		"C11 slash at the end": webID + "/", "C11 only the trust domain": td, "C11 the trust domain and a slash": td + "/", "C11 too long": td + "/" + strings.Repeat("a", 2048), "C11 10 KiB": td + "/" + strings.Repeat("a", 10<<10), "C11 trust domain too long": "spiffe://" + strings.Repeat("a", 256) + "/x",
		"C12 zone": "spiffe://[fe80::1%25en0]/ns/shop/sa/web", "C12 zone and name": "spiffe://[::1%25example.org]/ns/shop/sa/web", "C12 address": "spiffe://[::1]/ns/shop/sa/web", "C12 no host": "spiffe:///ns/shop/sa/web", "C12 opaque": "spiffe:example.org/ns/shop/sa/web",
		"C12 another scheme": "https://example.org/ns/shop/sa/web", "C12 no scheme": "//example.org/ns/shop/sa/web", "C12 empty": "", "C12 NUL": webID + "\x00", "C12 NUL within": td + "/ns/shop\x00/sa/web", "C12 space": td + "/ns/shop/sa/we b", "C12 newline": webID + "\n",
		"C12 not ASCII": td + "/ns/shop/sa/wéb", "C12 invalid UTF-8": webID + "\xff", "C12 backslash": td + "\\ns\\shop", "C12 star": td + "/ns/shop/sa/*", "C12 comma": webID + "," + webID, "C12 colon": td + "/ns:shop/sa/web", "C12 tilde": td + "/ns/~shop/sa/web", "C12 semicolon": webID + ";x", "C12 plus": webID + "+x",
	}
	foreign := map[string]string{
		"neighbour": td + "/ns/" + stranger + "/sa/db", "prefix": td + "/ns/shop/sa/we", "suffix": webID + "x", "longer": webID + "/x", "shorter": td + "/ns/shop", "case": td + "/ns/shop/sa/Web", "another trust domain": "spiffe://example.com/ns/shop/sa/web",
		"sub-domain": "spiffe://a.example.org/ns/shop/sa/web", "super-domain": "spiffe://org/ns/shop/sa/web", "dot behind": "spiffe://example.org./ns/shop/sa/web", "agent": td + "/signet/agent/" + stranger, "replica": td + "/signet/ca/ca-0", "admin": td + "/signet/admin/alice", "swapped": td + "/ns/web/sa/shop",
	}
	withCSRs(t, 200, func(t *testing.T, a csrAsker) {
		for name, uri := range sorted(malformed) {
			a.ask(name[:3], name[4:], request(t, a.key, extensions(san(general(6, uri)))), "", api.IDMalformed)
			a.ask(name[:3], name[4:]+", own first", request(t, a.key, extensions(san(ownURI, general(6, uri)))), "", api.CSRURICount)
			a.ask(name[:3], name[4:]+", own last", request(t, a.key, extensions(san(general(6, uri), ownURI))), "", api.CSRURICount, api.IDMalformed)
			a.ask(name[:3], name[4:]+", in the subject", signed(t, a.key, tlv(0x30, []byte{2, 1, 0}, tlv(0x30, tlv(0x31, tlv(0x30, []byte{6, 3, 0x55, 4, 3}, tlv(12, []byte(uri))))), spkiOf(t, a.key.Public()), tlv(0xa0))),
				"the subject is skipped, whatever it holds", api.CSRTooLarge)
		}
		for name, uri := range sorted(foreign) {
			a.ask("C02", "ID of a "+name, request(t, a.key, extensions(san(general(6, uri)))), "", api.IDMismatch)
		}
	})
}

// TestNames are tokens, good in all else, for namespaces and ServiceAccounts that Kubernetes would never let be. The pod
// lives, as far as anybody knows; only the names are in the way.
//
// threat: A18, CVE-2021-41803, GHSA-59w7, CVE-2026-39350
func TestNames(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		ask := func(name, namespace, account string) {
			t.Helper()
			pod := attestortest.NewPod(namespace, "web-x", account, here)
			r.Pods.Add(pod)
			r.ask(variant{row: "A18", name: name, item: r.item(r.Evidence(pod, api.WorkloadAudience(r.TD), time.Hour).Data), want: one(api.SubjectMalformed)})
		}
		for name, s := range sorted(impossible()) {
			ask("namespace "+name, s, "web")
			ask("ServiceAccount "+name, "shop", s)
			ask("both "+name, s, s)
			ask("namespace with "+name+" in it", "shop"+s+"x", "web")
			ask("ServiceAccount with "+name+" in it", "shop", "web"+s+"x")
		}
		ask("a namespace with a dot", "shop.bank", "web")
		ask("64 bytes of namespace", strings.Repeat("a", 64), "web")
		ask("254 bytes of ServiceAccount", "shop", strings.Repeat("a", 254))
		r.tell(200)
	})
}

// impossible are texts that no name has and that are not good in a name either.
func impossible() map[string]string {
	return map[string]string{
		"slash": "/", "dots": "/../", "a way out": "/../../signet/agent/x", "backslash": `\`, "colon": ":", "star": "*", "plus": "+", "comma": ",", "at": "@", "hash": "#", "question": "?", "percent": "%", "escaped slash": "%2f",
		"space": " ", "tab": "\t", "newline": "\n", "return": "\r\n", "NUL": "\x00", "escape": "\x1b[31m", "quote": `"`, "tick": "'", "brace": "{", "placeholder": "{serviceAccount}", "dollar": "${HOME}", "dot dot": "..", "upper case": "A",
		"underscore": "_", "tilde": "~", "equals": "=", "ampersand": "&", "less": "<x>", "pipe": "|", "semicolon": ";", "Cyrillic": "а", "full width": "ａ", "joiner": "\u200d", "right to left": "\u202e", "combining": "\u0301", "emoji": "🔑", "dotless": "ı",
		"full stop": "。", "slash look-alike": "∕", "no-break": "\u00a0", "line separator": "\u2028", "log line": "\n{\"level\":\"error\"}", "class": "[a-z]", "caret": "^", "bracket": "(x)",
	}
}

// TestNamesInTemplates uses names that Kubernetes does let be, where they could become more than a name: each pod gets its
// own identity and DNS names, made as the policy says, or none.
//
// threat: A18, C02, CVE-2026-39350
func TestNamesInTemplates(t *testing.T) {
	policy := ca.PolicyFile{
		Namespaces: []string{"shop", "sa", "ns", "signet", "a-b", "a", "xn--bcher-kva", "10", "svc"},
		Rules:      []ca.PolicyRule{{Namespaces: []string{"*"}, DNSNames: []string{"{serviceAccount}.{namespace}.svc.example.org"}}},
	}
	withRig(t, catest.Options{Policy: policy}, func(t *testing.T, r *rig) {
		owner := map[string]string{}
		accounts := []string{"web", "sa", "ns", "signet", "agent", "admin", "ca", "default", "0", "10", "1e3", "null", "true", "xn--bcher-kva", "a", "b", "a-b", "web.shop", "a.b", "web.svc", "127.0.0.1",
			"x.signet", "localhost", strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("a.", 126) + "a", "a--b"}
		for _, namespace := range append(slices.Clone(policy.Namespaces), "sho", "shopp", "shop-2", "a-bc", stranger) {
			for _, account := range accounts {
				pod, name := r.Pod(namespace, "p", account, here), namespace+" "+account
				item := r.item(r.Evidence(pod, api.WorkloadAudience(r.TD), time.Hour).Data)
				key := newKey(t)
				item.Csr = newCSR(t, key)
				v := variant{row: "A18", name: name, item: item, is: "spiffe://example.org/ns/" + namespace + "/sa/" + account, key: key.Public()}
				switch {
				case !slices.Contains(policy.Namespaces, namespace):
					v.want = one(api.NamespaceNotAllowed)
				case strings.Contains(account, ".") || len(account) > 63:
					v.want = one(api.DNSNameRefused)
				default:
					v.harmless, v.dns = "an identity of its own", account+"."+namespace+".svc.example.org"
					if other, ok := owner[v.is]; ok {
						t.Errorf("%s and %s have one identity", name, other)
					}
					owner[v.is] = name
				}
				r.ask(v)
			}
		}
		r.tell(350)
	})
}
