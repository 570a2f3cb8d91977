package journal

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

// TestRotation takes one rotation from its beginning to its end: the generation rises exactly when the bundle changes, and
// each step taken twice is taken once.
//
// threat: E19
func TestRotation(t *testing.T) {
	roots := pool(t, 2)
	j := journalOf(t, roots[0])
	now := t0
	start := planned("op", roots[1].by(t, roots[0]))
	j = must(t)(Start(j, start, now))
	other := start
	other.Authority = makeRoot(t, "third", 24*time.Hour).Authority // made anew by whoever did not hear the answer
	if again := must(t)(Start(j, other, now.Add(time.Second))); !cmp.Equal(again, j) {
		t.Error("a rotation that was begun twice has two roots")
	}
	var taken []Step
	for _, want := range []struct {
		do         Do
		generation string
		old, new   State
		after      time.Duration
	}{
		{Publish, "1.2", Active, Published, 0},
		{Activate, "1.2", Retiring, Active, 0},
		{Remove, "1.3", Removed, Active, 2 * time.Hour},
	} {
		now = now.Add(want.after)
		s, blockers := Next(j, now, ready(t, j, now))
		if s.Do != want.do {
			t.Fatalf("%v, want %s: %+v", s, want.do, blockers)
		}
		before := j
		j = must(t)(Apply(j, s, now))
		if j.Generation().String() != want.generation || stateOf(j, roots[0].ID) != want.old || stateOf(j, roots[1].ID) != want.new {
			t.Fatalf("after %v: generation %s, %s, %s", s, j.Generation(), stateOf(j, roots[0].ID), stateOf(j, roots[1].ID))
		}
		if before.Generation() == j.Generation() && heldOf(t, before) != heldOf(t, j) {
			t.Error("two bundles of one generation")
		}
		for _, s := range append(taken, s) { // again, and all that came before it
			if again := must(t)(Apply(j, s, now.Add(time.Minute))); !cmp.Equal(again, j) {
				t.Errorf("%v, taken again, changes the record", s)
			}
		}
		taken = append(taken, s)
	}
	if j.Operation != nil || len(j.Past) != 1 || j.Past[0].Outcome != Done || len(j.Gone) != 1 || len(j.Authorities) != 1 {
		t.Errorf("at the end: %+v", j)
	}
	if again := must(t)(Start(j, start, now)); !cmp.Equal(again, j) {
		t.Error("a rotation that is over was begun again")
	}
	if s, blockers := Next(j, now, Acks{}); s.Is() || len(blockers) > 0 {
		t.Errorf("with nothing under way: %v, %+v", s, blockers)
	}
}

// fleet is a record and its evidence in the middle of a rotation.
type fleet struct {
	j    Journal
	now  time.Time
	acks Acks
}

// published is the moment after a new root came into the bundle, with everybody ready.
func published(t testing.TB, cross bool, change ...func(*StartRequest)) fleet {
	roots := pool(t, 2)
	j := journalOf(t, roots[0])
	r := planned("op", roots[1].Authority)
	if cross {
		r.Authority = roots[1].by(t, roots[0])
	}
	for _, f := range change {
		f(&r)
	}
	j = must(t)(Start(j, r, t0))
	j = step(t, j, t0, ready(t, j, t0))
	return fleet{j, t0, ready(t, j, t0)}
}

// TestActivateGate: the new root signs nothing while somebody live lacks it, and whoever lacks it is named. I3.
//
// threat: E13
func TestActivateGate(t *testing.T) {
	older := func(j Journal) Held {
		h := heldOf(t, j)
		h.Generation.Number--
		h.Hash[0] ^= 1
		return h
	}
	excuse := func(e Excuse) func(f *fleet) {
		return func(f *fleet) {
			f.acks.Agents[0].Held = older(f.j)
			f.acks.Agents[0].Pods[0].Streams[0].Acked = older(f.j)
			e.By, e.Reason, e.Until = "uid:0", "drained", f.now.Add(time.Hour)
			f.j = must(t)(f.j.WithExcuse(e, f.now))
		}
	}
	pod := func(s Stream) func(f *fleet) {
		return func(f *fleet) { f.acks.Agents[0].Pods[0].Streams[0] = s }
	}
	type row struct {
		name   string
		cross  bool
		change func(f *fleet)
		blocks []string // names
		passes map[string]Pass
	}
	for _, tt := range []row{
		{name: "everybody has it", change: func(*fleet) {}},
		{name: "an agent lacks it", change: func(f *fleet) { f.acks.Agents[0].Held = older(f.j) }, blocks: []string{"node/node-a"}},
		{name: "an agent never said anything", change: func(f *fleet) { f.acks.Agents[0].Held = Held{} }, blocks: []string{"node/node-a"}},
		{name: "another bundle of that number", change: func(f *fleet) { f.acks.Agents[0].Held.Hash[3] ^= 1 }, blocks: []string{"node/node-a"}},
		{name: "a later bundle than there is", change: func(f *fleet) { f.acks.Agents[0].Held.Generation.Number++ }, blocks: []string{"node/node-a"}},
		{name: "away, with SVIDs", change: func(f *fleet) {
			f.acks.Agents[0].Connected, f.acks.Agents[0].Held = false, older(f.j)
		}, blocks: []string{"node/node-a"}},
		{name: "not heard of since the CA was started", change: func(f *fleet) {
			f.acks.Agents[0].Connected, f.acks.Agents[0].Pods, f.acks.Agents[0].PodsUnknown = false, nil, true
		}, blocks: []string{"node/node-a"}},
		{name: "away, its SVIDs expired", change: func(f *fleet) {
			f.acks.Agents[0].Connected, f.acks.Agents[0].Held, f.acks.Agents[0].Until = false, older(f.j), f.now
		}},
		{name: "a stream that acknowledged nothing", change: pod(Stream{Bundle: true}), blocks: []string{"pod/shop/web-0"}},
		{name: "a stream that rejects it", change: pod(Stream{Bundle: true, Nack: "no"}), blocks: []string{"pod/shop/web-0"}},
		{name: "sixteen streams of one pod", change: func(f *fleet) {
			f.acks.Agents[0].Pods[0].Streams = slices.Repeat([]Stream{{Bundle: true, Nack: "no"}}, 16)
		}, blocks: []string{"pod/shop/web-0"}},
		{name: "a stream that did not subscribe", change: pod(Stream{})},
		{name: "the Workload API without it", change: pod(Stream{WorkloadAPI: true}), blocks: []string{"pod/shop/web-0"}},
		{name: "the Workload API, just now", change: func(f *fleet) {
			pod(Stream{WorkloadAPI: true, Pushed: heldOf(t, f.j), PushedAt: f.now})(f)
		}, blocks: []string{"pod/shop/web-0"}},
		{name: "the Workload API after the soak", change: func(f *fleet) {
			pod(Stream{WorkloadAPI: true, Pushed: heldOf(t, f.j), PushedAt: f.now.Add(-DefaultSoak)})(f)
		}, passes: map[string]Pass{"pod/shop/web-0": Unproven}},
		{name: "one stream soaks and one did", change: func(f *fleet) {
			s := Stream{WorkloadAPI: true, Pushed: heldOf(t, f.j), PushedAt: f.now.Add(-DefaultSoak)}
			late := s
			late.PushedAt = f.now
			f.acks.Agents[0].Pods[0].Streams = []Stream{s, late, s}
		}, blocks: []string{"pod/shop/web-0"}},
		{name: "a ConfigMap without it", change: func(f *fleet) { f.acks.Copies[0].Held = older(f.j) }, blocks: []string{"ConfigMap/signet-bundle"}},
		{name: "a ConfigMap, just now", change: func(f *fleet) { f.acks.Copies[0].At = f.now }, blocks: []string{"ConfigMap/signet-bundle"}},
		{name: "no replica", change: func(f *fleet) { f.acks.Replicas = nil }, blocks: []string{"replicas"}},
		{name: "no evidence at all", change: func(f *fleet) { f.acks = Acks{} }, blocks: []string{"replicas"}},
		{name: "a clock in doubt", change: func(f *fleet) { f.acks.Clock = "it jumped by 1h" }, blocks: []string{"clock"}},
		{name: "a clock that was set back", change: func(f *fleet) { f.now = f.now.Add(-time.Hour) }, blocks: []string{"authority/", "clock", "ConfigMap/signet-bundle"}},
		{name: "node excused", change: excuse(Excuse{Scope: ScopeNode, Name: "node-a"}), passes: map[string]Pass{"node/node-a": Excused, "pod/shop/web-0": Excused}},
		{name: "node excused by its UID", change: excuse(Excuse{Scope: ScopeNode, Cluster: "https://k8s.test", Name: "uid-node-a"}), passes: map[string]Pass{"node/node-a": Excused, "pod/shop/web-0": Excused}},
		{name: "node of another cluster excused", change: excuse(Excuse{Scope: ScopeNode, Cluster: "https://other.test", Name: "node-a"}), blocks: []string{"node/node-a", "pod/shop/web-0"}},
		{name: "namespace excused", change: excuse(Excuse{Scope: ScopeNamespace, Name: "shop"}), blocks: []string{"node/node-a"}, passes: map[string]Pass{"pod/shop/web-0": Excused}},
		{name: "pod excused", change: excuse(Excuse{Scope: ScopePod, Name: "shop/web-0"}), blocks: []string{"node/node-a"}, passes: map[string]Pass{"pod/shop/web-0": Excused}},
		{name: "excuse over", change: func(f *fleet) {
			excuse(Excuse{Scope: ScopeNode, Name: "node-a"})(f)
			f.now = f.now.Add(time.Hour)
		}, blocks: []string{"node/node-a", "pod/shop/web-0"}},
		{name: "the limit is not over", cross: true, change: func(f *fleet) {
			pod(Stream{Bundle: true, Nack: "no"})(f)
			f.now = f.now.Add(DefaultStraggler - time.Second)
		}, blocks: []string{"pod/shop/web-0"}},
		{name: "the limit is over, cross-signed", cross: true, change: func(f *fleet) {
			pod(Stream{Bundle: true, Nack: "no"})(f)
			f.now = f.now.Add(DefaultStraggler)
		}, passes: map[string]Pass{"pod/shop/web-0": Straggler}},
		{name: "the limit is over, not cross-signed", change: func(f *fleet) {
			pod(Stream{Bundle: true, Nack: "no"})(f)
			f.now = f.now.Add(30 * 24 * time.Hour)
		}, blocks: []string{"pod/shop/web-0"}},
		{name: "the old root has expired", change: func(f *fleet) { // I10
			f.j.Authorities[0].Certificate = makeRoot(t, "x", time.Minute, func(c *x509.Certificate) {
				old, err := x509.ParseCertificate(f.j.Authorities[0].Certificate)
				if err != nil {
					t.Fatal(err)
				}
				c.SubjectKeyId = old.SubjectKeyId
			}).Certificate
			f.acks = ready(t, f.j, f.now)
			pod(Stream{Bundle: true})(f)
			f.now = f.now.Add(time.Minute)
		}, passes: map[string]Pass{"pod/shop/web-0": Expired}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := published(t, tt.cross)
			tt.change(&f)
			s, found := Next(f.j, f.now, f.acks)
			var blocks []string
			passes := map[string]Pass{}
			for _, b := range found {
				if b.Name == "authority/"+f.j.Operation.Authority {
					b.Name = "authority/"
				}
				if b.Blocks() {
					blocks = append(blocks, b.Name)
				} else if b.Kind != ByCopy { // it never is more than unproven
					passes[b.Name] = b.Pass
				}
				if b.Why == "" {
					t.Errorf("%s, and nobody knows why", b.Name)
				}
			}
			if tt.passes == nil {
				tt.passes = map[string]Pass{}
			}
			if diff := cmp.Diff(tt.blocks, blocks); diff != "" {
				t.Errorf("blockers (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.passes, passes); diff != "" && len(tt.blocks) == 0 {
				t.Errorf("passed over (-want +got):\n%s", diff)
			}
			if s.Is() != (len(tt.blocks) == 0) || s.Is() && (s.Do != Activate || len(s.Passed) != len(found)) {
				t.Errorf("step %v", s)
			}
		})
	}
}

// TestLatest: an automatic rotation whose latest date is over waits for nobody, unless most agents are away.
func TestLatest(t *testing.T) {
	f := published(t, false, func(r *StartRequest) { r.Automatic = true })
	f.acks.Agents[0].Pods[0].Streams[0].Acked = Held{}
	f.acks.Agents[1].Held = Held{}
	f.now = f.j.Operation.Latest.Add(-time.Second)
	if s, _ := Next(f.j, f.now, f.acks); s.Is() {
		t.Errorf("%v before the latest date", s)
	}
	f.now = f.j.Operation.Latest
	s, found := Next(f.j, f.now, f.acks)
	if !s.Is() || len(found) != 3 || found[0].Pass != Overdue || found[1].Pass != Unproven || found[2].Pass != Overdue {
		t.Errorf("%v at the latest date: %+v", s, found)
	}
	for i := range f.acks.Agents {
		f.acks.Agents[i].Connected, f.acks.Agents[i].Until = false, f.now.Add(time.Hour)
	}
	s, found = Next(f.j, f.now, f.acks)
	if s.Is() || !slices.ContainsFunc(found, func(b Blocker) bool { return b.Kind == ByAbsence && b.Blocks() }) {
		t.Errorf("%v while most agents are away: %+v", s, found)
	}
}

// TestLateByTwo: a node that is late by two rotations knows neither the new root nor the one that cross-signed it, and is waited
// for; a pod of a node that is not late holds up nothing for ever.
func TestLateByTwo(t *testing.T) {
	roots := pool(t, 3)
	j := journalOf(t, roots[0])
	first := heldOf(t, j)
	j = must(t)(Start(j, planned("one", roots[1].by(t, roots[0])), t0))
	now := t0
	for j.Operation != nil {
		j = step(t, j, now, ready(t, j, now))
		now = now.Add(2 * time.Hour)
	}
	j = must(t)(Start(j, planned("two", roots[2].by(t, roots[1])), now))
	j = step(t, j, now, ready(t, j, now))
	now = now.Add(DefaultStraggler)
	acks := ready(t, j, now)
	acks.Agents[0].Pods[0].Streams[0].Acked = first
	if s, found := Next(j, now, acks); s.Do != Activate {
		t.Errorf("a pod: %+v", found)
	}
	acks.Agents[0].Held = first
	if s, found := Next(j, now, acks); s.Is() || found[0].Name != "node/node-a" || !found[0].Blocks() || found[0].Hard {
		t.Errorf("a node: %v, %+v", s, found)
	}
	j.Operation.Automatic, j.Operation.Latest = true, now.Add(time.Hour)
	if s, _ := Next(j, now, acks); s.Is() {
		t.Errorf("a node, before the latest date: %v", s)
	}
	now = j.Operation.Latest // from which on nobody is waited for, however late he is
	acks = ready(t, j, now)
	acks.Agents[0].Held = first
	if s, found := Next(j, now, acks); s.Do != Activate || found[0].Pass != Overdue {
		t.Errorf("a node, at the latest date: %v, %+v", s, found)
	}
}

// TestForce: a step is taken over those in its way only by naming exactly them, and never over SVIDs that have not expired.
func TestForce(t *testing.T) {
	f := published(t, false)
	f.acks.Agents[0].Held = Held{}
	f.acks.Agents[1].Pods[0].Streams[0].Acked = Held{}
	for _, tt := range []struct {
		name  string
		names []string
		by    string
		want  api.Reason
	}{
		{"nobody", nil, "uid:0", api.BlockersChanged},
		{"one of three", []string{"node/node-a"}, "uid:0", api.BlockersChanged},
		{"one too many", []string{"node/node-a", "pod/shop/web-1", "node/node-b"}, "uid:0", api.BlockersChanged},
		{"one twice", []string{"node/node-a", "node/node-a"}, "uid:0", api.BlockersChanged},
		{"by nobody", []string{"node/node-a", "pod/shop/web-1"}, "", api.RotationInvalid},
		{"all", []string{"pod/shop/web-1", "node/node-a"}, "uid:0", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Force(f.j, f.now, f.acks, tt.names, tt.by)
			if tt.want != "" {
				if s.Is() || api.ReasonOf(err) != tt.want {
					t.Errorf("%v, %v", s, err)
				}
				return
			}
			j := must(t)(Apply(f.j, s, f.now))
			if err != nil || len(s.Forced) != 2 || len(s.Passed) != 3 || s.Passed[0].Pass != Forced || s.Passed[1].Pass != Unproven ||
				len(j.Operation.Forced) != 1 || j.Operation.Forced[0].Count != 2 || j.Operation.Forced[0].By != "uid:0" {
				t.Errorf("%v, %+v: %v", s, j.Operation.Forced, err)
			}
		})
	}
	f = retiring(t)
	_, found := Next(f.j, f.now, f.acks)
	var names []string
	for _, b := range found {
		if b.Blocks() {
			names = append(names, b.Name)
		}
	}
	if s, err := Force(f.j, f.now, f.acks, names, "uid:0"); api.ReasonOf(err) != api.RotationBlocked || s.Is() || len(names) == 0 {
		t.Errorf("forced over %q: %v, %v", names, s, err)
	}
}

// retiring is the moment after the new root became active: leaves under the old one are an hour old at most.
func retiring(t testing.TB) fleet {
	f := published(t, true)
	old := f.j.ActiveAuthority().ID
	f.j = step(t, f.j, f.now, f.acks)
	f.acks = ready(t, f.j, f.now)
	for i := range f.acks.Replicas {
		r := &f.acks.Replicas[i]
		r.Leaves[old] = f.now.Add(time.Hour)
		r.Intermediates = append(r.Intermediates, Intermediate{Root: old, NotAfter: f.now.Add(24 * time.Hour), Destroyed: true})
	}
	return f
}

// TestRemoveGate: the old root goes when nothing that was signed under it can be alive, and not before. I2, I6.
//
// threat: E14
func TestRemoveGate(t *testing.T) {
	hour := func(n int) func(*fleet) { return func(f *fleet) { f.now = f.now.Add(time.Duration(n) * time.Hour) } }
	for _, tt := range []struct {
		name   string
		change func(*fleet)
		blocks []string
	}{
		{"leaves are alive", func(*fleet) {}, []string{"leaves/ca-0", "leaves/ca-1"}},
		{"leaves of one replica are alive", func(f *fleet) {
			hour(1)(f)
			f.acks.Replicas[1].Leaves[f.j.Operation.Replaces] = f.now.Add(time.Second)
		}, []string{"leaves/ca-1"}},
		{"all have expired", hour(1), nil},
		{"a key is not destroyed", func(f *fleet) {
			hour(1)(f)
			f.acks.Replicas[1].Intermediates[1].Destroyed = false
		}, []string{"replica/ca-1"}},
		{"a replica that cannot be asked", func(f *fleet) {
			hour(1)(f)
			f.acks.Replicas[1].Reachable, f.acks.Replicas[1].Signs, f.acks.Replicas[1].Intermediates[1].Destroyed = false, f.j.Operation.Replaces, false
		}, []string{"replica/ca-1"}},
		{"a replica that cannot be asked, until its intermediate has expired", func(f *fleet) {
			hour(24)(f)
			f.acks.Replicas[1].Reachable, f.acks.Replicas[1].Signs, f.acks.Replicas[1].Intermediates[1].Destroyed = false, f.j.Operation.Replaces, false
		}, nil},
		{"a replica has not taken it up", func(f *fleet) {
			hour(1)(f)
			f.acks.Replicas[0].Signs = f.j.Operation.Replaces
		}, []string{"replica/ca-0"}},
		{"no replica", func(f *fleet) { hour(48)(f); f.acks.Replicas = nil }, []string{"replicas"}},
		{"no replica can sign", func(f *fleet) {
			hour(48)(f)
			f.acks.Replicas[0].Ready, f.acks.Replicas[1].Ready = false, false
		}, []string{"replicas"}},
		{"one replica can sign", func(f *fleet) { hour(48)(f); f.acks.Replicas[0].Ready = false }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := retiring(t)
			old := f.j.Operation.Replaces
			tt.change(&f)
			for i := range f.acks.Agents {
				f.acks.Agents[i].Seen, f.acks.Agents[i].Until = f.now, f.now.Add(time.Hour)
			}
			s, found := Next(f.j, f.now, f.acks)
			var blocks []string
			for _, b := range found {
				if b.Blocks() {
					blocks = append(blocks, b.Name)
				}
			}
			if diff := cmp.Diff(tt.blocks, blocks); diff != "" {
				t.Errorf("blockers (-want +got):\n%s", diff)
			}
			if i := f.j.find(old); len(f.j.Authorities[i].SealedKey) == 0 {
				t.Error("the old key is gone before its root")
			}
			if (s.Do == Remove) != (tt.blocks == nil) {
				t.Errorf("step %v", s)
			}
		})
	}
}

// TestRefusedRoots: an authority has a key, a name and an id of its own, and none comes back. I8, I5.
func TestRefusedRoots(t *testing.T) {
	roots := pool(t, 4)
	a, b := roots[0], roots[1]
	j := journalOf(t, a)
	j = must(t)(Start(j, planned("gone", b.Authority), t0))
	j = must(t)(Abort(j, request("gone"), t0))
	sameName := makeRoot(t, "x", time.Hour*48, func(c *x509.Certificate) { c.Subject = a.cert.Subject })
	outlives := roots[2].by(t, a)
	withCross := func(change func(*Authority)) Authority {
		x := roots[2].by(t, a)
		change(&x)
		return x
	}
	short := makeRoot(t, "short", 59*time.Minute)
	twin := roots[3]
	der, err := x509.CreateCertificate(nil, &x509.Certificate{
		SerialNumber: a.cert.SerialNumber, Subject: pkix.Name{CommonName: "twin"}, NotBefore: t0, NotAfter: t0.Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte("another id"), KeyUsage: x509.KeyUsageCertSign,
	}, a.cert, a.cert.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	twin.Certificate, twin.ID = der, "616e6f74686572206964"
	for _, tt := range []struct {
		name string
		a    Authority
		want api.Reason
	}{
		{"good", roots[2].Authority, ""},
		{"good and cross-signed", outlives, ""},
		{"the active one", a.Authority, api.AuthorityRefused},
		{"one that is gone", b.Authority, api.AuthorityRefused},
		{"the name of another", sameName.Authority, api.AuthorityRefused},
		{"the key of another", twin.Authority, api.AuthorityRefused},
		{"nothing", Authority{}, api.AuthorityRefused},
		{"expires too soon", short.Authority, api.AuthorityRefused},
		{"cross-signed by a stranger", roots[2].by(t, roots[3]), api.AuthorityRefused},
		{"cross-signed by a stranger who says he is not", withCross(func(x *Authority) { x.Cross = roots[2].by(t, roots[3]).Cross }), api.AuthorityRefused},
		{"cross-signed by nobody", withCross(func(x *Authority) { x.CrossBy = "" }), api.AuthorityRefused},
		{"another's cross-signed certificate", withCross(func(x *Authority) { x.Cross = roots[3].by(t, a).Cross }), api.AuthorityRefused},
		{"a cross-signed certificate that does not parse", withCross(func(x *Authority) { x.Cross = x.Cross[1:] }), api.AuthorityRefused},
		{"a forged signature", withCross(func(x *Authority) {
			x.Cross = slices.Clone(x.Cross)
			x.Cross[len(x.Cross)-1] ^= 1
		}), api.AuthorityRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Start(j, planned("op", tt.a), t0)
			if tt.want == "" && err != nil || tt.want != "" && api.ReasonOf(err) != tt.want {
				t.Fatalf("%v, want %q", err, tt.want)
			}
			if err == nil && stateOf(got, tt.a.ID) != Prepared {
				t.Error("it is not prepared")
			}
		})
	}
}
