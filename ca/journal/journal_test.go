package journal

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"flag"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
)

var update = flag.Bool("update", false, "rewrite the golden record; only together with a new Schema")

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authority makes a root, changed as a test wants.
func authority(t testing.TB, change ...func(*x509.Certificate)) Authority {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	ski := make([]byte, 20)
	rand.Read(ski)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: ski,
	}
	for _, f := range change {
		f(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return Authority{ID: hex.EncodeToString(c.SubjectKeyId), State: Active, Certificate: der, SealedKey: []byte("sealed")}
}

func inState(t testing.TB, s State) Authority {
	a := authority(t)
	a.State = s
	return a
}

func newJournal(t testing.TB) Journal {
	t.Helper()
	j, err := New(td, authority(t))
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestNew(t *testing.T) {
	root := inState(t, Prepared)
	j, err := New(td, root)
	if err != nil {
		t.Fatal(err)
	}
	root.State = Active
	want := Journal{Schema: Schema, TrustDomain: "example.org", Epoch: 1, Number: 1, Authorities: []Authority{root}}
	if diff := cmp.Diff(want, j); diff != "" {
		t.Errorf("a new journal (-want +got):\n%s", diff)
	}
	if g := j.Generation(); g.String() != "1.1" || g.Sequence() != 1<<32|1 {
		t.Errorf("generation %s, sequence %d", g, g.Sequence())
	}
	if _, err := New(td, Authority{}); api.ReasonOf(err) != api.StateCorrupt {
		t.Errorf("without a root: %v", err)
	}
	if a := (Journal{}).ActiveAuthority(); a.ID != "" {
		t.Error("nothing has an active authority")
	}
}

// TestRoots puts exactly the trusted states into the bundle, in the order of the record.
func TestRoots(t *testing.T) {
	j := newJournal(t)
	var want [][]byte
	for _, s := range []State{Prepared, Published, Retiring, Tainted, Removed} {
		a := inState(t, s)
		j.Authorities = append(j.Authorities, a)
	}
	for _, i := range []int{0, 2, 3, 4} {
		want = append(want, j.Authorities[i].Certificate)
	}
	if err := j.Validate(); err != nil {
		t.Fatal(err)
	}
	roots, err := j.Roots()
	if err != nil {
		t.Fatal(err)
	}
	var got [][]byte
	for _, c := range roots {
		got = append(got, c.Raw)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("roots (-want +got):\n%s", diff)
	}
	if j.ActiveAuthority().ID != j.Authorities[0].ID {
		t.Error("the active authority is another one")
	}
}

// TestValidate refuses what no record may be.
//
// spiffe: X-05
func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Journal)
		want   api.Reason // empty: valid
	}{
		{"as made", func(*Journal) {}, ""},
		{"schema 0", func(j *Journal) { j.Schema = 0 }, api.StateCorrupt},
		{"negative schema", func(j *Journal) { j.Schema = -1 }, api.StateCorrupt},
		{"newer schema", func(j *Journal) { j.Schema = Schema + 1 }, api.StateNewer},
		{"newer schema and nothing else", func(j *Journal) { *j = Journal{Schema: Schema + 1} }, api.StateNewer},
		{"no trust domain", func(j *Journal) { j.TrustDomain = "" }, api.StateCorrupt},
		{"malformed trust domain", func(j *Journal) { j.TrustDomain = "Example.org" }, api.StateCorrupt},
		{"trust domain as an ID", func(j *Journal) { j.TrustDomain = "spiffe://example.org" }, api.StateCorrupt},
		{"epoch 0", func(j *Journal) { j.Epoch = 0 }, api.StateCorrupt},
		{"number 0", func(j *Journal) { j.Number = 0 }, api.StateCorrupt},
		{"no authority", func(j *Journal) { j.Authorities = nil }, api.StateCorrupt},
		{"none active", func(j *Journal) { j.Authorities[0].State = Published }, api.StateCorrupt},
		{"two active", func(j *Journal) { j.Authorities = append(j.Authorities, authority(t)) }, api.StateCorrupt},
		{"a second one in waiting", func(j *Journal) { j.Authorities = append(j.Authorities, inState(t, Prepared)) }, ""},
		{"one of a key upstream", func(j *Journal) { j.Authorities[0].SealedKey = nil }, ""},
		{"unknown state", func(j *Journal) { j.Authorities = append(j.Authorities, inState(t, "revoked")) }, api.StateCorrupt},
		{"no state", func(j *Journal) { j.Authorities = append(j.Authorities, inState(t, "")) }, api.StateCorrupt},
		{"one authority twice", func(j *Journal) {
			a := j.Authorities[0]
			a.State = Retiring
			j.Authorities = append(j.Authorities, a)
		}, api.StateCorrupt},
		{"no certificate", func(j *Journal) { j.Authorities[0].Certificate = nil }, api.StateCorrupt},
		{"damaged certificate", func(j *Journal) { j.Authorities[0].Certificate = j.Authorities[0].Certificate[1:] }, api.StateCorrupt},
		{"something behind the certificate", func(j *Journal) { j.Authorities[0].Certificate = append(j.Authorities[0].Certificate, 0) }, api.StateCorrupt},
		{"no CA", func(j *Journal) {
			j.Authorities[0] = authority(t, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
		}, api.StateCorrupt},
		{"another's id", func(j *Journal) { j.Authorities[0].ID = strings.Repeat("0", 40) }, api.StateCorrupt},
		{"id in upper case", func(j *Journal) { j.Authorities[0].ID = strings.ToUpper(j.Authorities[0].ID) + "A" }, api.StateCorrupt},
		{"no id", func(j *Journal) { j.Authorities[0].ID = "" }, api.StateCorrupt},
		{"damage in what is removed", func(j *Journal) {
			a := inState(t, Removed)
			a.Certificate[5] ^= 0xff
			j.Authorities = append(j.Authorities, a)
		}, api.StateCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newJournal(t)
			tt.change(&j)
			err := j.Validate()
			if tt.want == "" && err != nil || tt.want != "" && api.ReasonOf(err) != tt.want {
				t.Errorf("%v, want %q", err, tt.want)
			}
			data, err := j.Encode()
			if tt.want != "" {
				if data != nil || api.ReasonOf(err) != tt.want {
					t.Errorf("it can be written: %v", err)
				}
				return
			}
			got, err := Decode(data)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(j, got); diff != "" {
				t.Errorf("there and back (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecode(t *testing.T) {
	good, err := newJournal(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	text := string(good)
	withBan, err := newJournal(t).WithBan(ban("c", "n"))
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := withBan.Encode()
	if err != nil {
		t.Fatal(err)
	}
	banned := string(encoded)
	for _, tt := range []struct {
		name, data string
		want       api.Reason
	}{
		{"empty", "", api.StateCorrupt},
		{"null", "null", api.StateCorrupt},
		{"no object", "[]", api.StateCorrupt},
		{"empty object", "{}", api.StateCorrupt},
		{"half", text[:len(text)/2], api.StateCorrupt},
		{"twice", text + text, api.StateCorrupt},
		{"a bracket behind it", text + "}", api.StateCorrupt},
		{"zeros behind it", text + "\x00\x00", api.StateCorrupt},
		{"unknown field", strings.Replace(text, `"epoch"`, `"rotation":1,"epoch"`, 1), api.StateCorrupt},
		{"unknown field of an authority", strings.Replace(text, `"state"`, `"use":"x","state"`, 1), api.StateCorrupt},
		{"schema as text", strings.Replace(text, `"schema":3`, `"schema":"2"`, 1), api.StateCorrupt},
		{"schema as a fraction", strings.Replace(text, `"schema":3`, `"schema":1.5`, 1), api.StateCorrupt},
		{"negative epoch", strings.Replace(text, `"epoch":1`, `"epoch":-1`, 1), api.StateCorrupt},
		{"epoch too large", strings.Replace(text, `"epoch":1`, `"epoch":4294967296`, 1), api.StateCorrupt},
		{"too large", `{"schema":1,"trustDomain":"` + strings.Repeat("a", maxBytes) + `"}`, api.StateCorrupt},
		{"of schema 1", strings.Replace(text, `"schema":3`, `"schema":1`, 1), ""},
		{"of schema 1 with bans", strings.Replace(banned, `"schema":3`, `"schema":1`, 1), api.StateCorrupt},
		{"unknown field of a ban", strings.Replace(banned, `"by"`, `"until":1,"by"`, 1), api.StateCorrupt},
		{"ban at no time", strings.Replace(banned, `"at":"2`, `"at":"x`, 1), api.StateCorrupt},
		{"newer", strings.Replace(text, `"schema":3`, `"schema":4`, 1), api.StateNewer},
		{"newer with fields of its own", `{"schema":7,"authorities":{"not":"a list"},"trustDomain":5}`, api.StateNewer},
		{"newer without a root", `{"schema":4}`, api.StateNewer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Decode([]byte(tt.data))
			if tt.want == "" && err != nil || tt.want != "" && api.ReasonOf(err) != tt.want {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// TestGolden keeps the shape of a record: one that an earlier build wrote must be read for ever, and what this build
// writes must be what it wrote.
func TestGolden(t *testing.T) {
	const newest = "testdata/schema-3.json"
	if *update {
		writeGolden(t, newest)
	}
	for schema, path := range map[int]string{1: "testdata/schema-1.json", 2: "testdata/schema-2.json", 3: newest} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		j, err := Decode(data)
		if err != nil {
			t.Fatalf("a record of schema %d is not read any more: %v", schema, err)
		}
		if j.Schema != schema || j.TrustDomain != "example.org" || j.Generation().String() != "2.5" || len(j.Authorities) < 2 ||
			j.Authorities[0].State != Active || j.Authorities[1].State != Published || schema < 3 && j.Authorities[2].State != Removed ||
			string(j.Authorities[0].SealedKey) != "sealed" || j.Authorities[1].SealedKey != nil {
			t.Errorf("read as %+v", j)
		}
		if schema >= 2 {
			if diff := cmp.Diff(goldenBans, j.Bans); diff != "" {
				t.Errorf("bans (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(goldenKeys, j.TicketKeys); diff != "" {
				t.Errorf("ticket keys (-want +got):\n%s", diff)
			}
		}
		if schema == 3 {
			checkGoldenRotation(t, j)
		}
		again, err := j.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, data); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(compact.String(), string(again)); diff != "" {
			t.Errorf("the record is written differently, which needs a new Schema (-golden +got):\n%s", diff)
		}
	}
}

// What schema-2.json holds beside what schema 1 had.
var (
	goldenAt   = time.Date(2026, 11, 23, 5, 6, 7, 89, time.UTC)
	goldenBans = []Ban{
		{Cluster: "https://a.test", NodeUID: "11111111-1111-4111-8111-111111111111", Node: "node-1", At: goldenAt, By: "uid:0", Reason: "stolen", ValidUntil: goldenAt.Add(time.Hour)},
		{Cluster: "https://b.test", NodeUID: "00000000-0000-4000-8000-000000000000", At: goldenAt.Add(time.Hour), By: "uid:1000"},
	}
	goldenKeys = []TicketKey{
		{ID: "00112233445566ff", At: goldenAt, Sealed: []byte("sealed 2")},
		{ID: "ffeeddccbbaa9988", At: goldenAt.Add(-time.Hour), Sealed: []byte("sealed 1")},
	}
)

func writeGolden(t *testing.T, path string) {
	j := goldenRotation(t)
	j.Bans, j.TicketKeys = goldenBans, goldenKeys
	data, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func FuzzDecode(f *testing.F) {
	j := newJournal(f)
	good, err := j.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, path := range []string{"testdata/schema-1.json", "testdata/schema-2.json", "testdata/schema-3.json"} {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(bytes.Replace(good, []byte(`"epoch"`), []byte(`"bans":[],"ticketKeys":null,"epoch"`), 1))
	f.Add([]byte(`{"schema":2}`))
	f.Add([]byte(`{"schema":3}`))
	f.Add([]byte(`{"schema":1,"trustDomain":"a","epoch":1,"number":1,"authorities":[{}]}`))
	f.Add([]byte(`{"schema":1,"schema":3}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, err := Decode(data)
		if err != nil {
			if r := api.ReasonOf(err); r != api.StateCorrupt && r != api.StateNewer {
				t.Fatalf("reason %s: %v", r, err)
			}
			return
		}
		if j.ActiveAuthority().ID == "" {
			t.Fatal("no active authority")
		}
		if _, err := j.Roots(); err != nil {
			t.Fatal(err)
		}
		turn(t, j)
		again, err := j.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Decode(again); err != nil || !cmp.Equal(j, back, cmpopts.EquateEmpty()) {
			t.Fatalf("not the same again: %v", err)
		}
	})
}

// turn does with a record what a rotation does; whatever it holds, what comes out can be stored again.
func turn(t *testing.T, j Journal) {
	t.Helper()
	Due(j, t0)
	Plan(j, t0, Acks{}, Limits{})
	id, root := "op", j.ActiveAuthority().ID
	if j.Operation != nil {
		id, root = j.Operation.ID, j.Operation.Authority
	}
	check := func(next Journal, err error) {
		if err != nil {
			return
		}
		if err := next.Validate(); err != nil {
			t.Fatal(err)
		}
	}
	if s, _ := Next(j, t0.Add(48*time.Hour), Acks{Replicas: []Replica{{Name: "ca-0"}}}); s.Is() {
		check(Apply(j, s, t0.Add(48*time.Hour)))
	}
	check(Abort(j, request(id), t0))
	check(Rollback(j, request(id), t0))
	check(Taint(j, TaintRequest{Request: request("fire"), Compromised: root}, t0))
}
