//go:build linux

package csi

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// What is not exactly the volume that we serve is refused, for a reason that its author can act on, and leaves nothing: not
// in the folder, not in what is remembered, and nobody waits for an identity.
func TestRefused(t *testing.T) {
	t.Parallel()
	p, other := testPod(1), testPod(2)
	good := func(k *kubelet) *csipb.NodePublishVolumeRequest { return k.request(p, p.token(1)) }
	for _, tc := range []struct {
		name   string
		change func(k *kubelet, r *csipb.NodePublishVolumeRequest)
		reason api.Reason
	}{
		{"writable", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.Readonly = false }, api.VolumeRefused},
		{"persistent", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyEphemeral] = "false" }, api.VolumeRefused},
		{"no pod info", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext = nil }, api.VolumeRefused},
		{"no pod", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { delete(r.VolumeContext, keyPodName) }, api.VolumeRefused},
		{"odd pod", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyPodName] = "a/../b" }, api.VolumeRefused},
		{"odd namespace", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyNamespace] = "a.b" }, api.VolumeRefused},
		{"odd account", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeContext[keyAccount] = strings.Repeat("a", 254)
		}, api.VolumeRefused},
		{"attributes", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext["socket"] = "x" }, api.VolumeRefused},
		{"very many attributes", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			for n := range 100 {
				r.VolumeContext[fmt.Sprint(ownPrefix, n)] = ""
			}
		}, api.VolumeRefused},
		{"block device", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessType = &csipb.VolumeCapability_Block{Block: &csipb.VolumeCapability_BlockVolume{}}
		}, api.VolumeRefused},
		{"no capability", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeCapability = nil }, api.VolumeRefused},
		{"file system", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" }, api.VolumeRefused},
		{"mount options", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeCapability.GetMount().MountFlags = []string{"suid"}
		}, api.VolumeRefused},
		{"group", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeCapability.GetMount().VolumeMountGroup = "0"
		}, api.VolumeRefused},
		{"many nodes", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessMode.Mode = csipb.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		}, api.VolumeRefused},
		{"staged", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.StagingTargetPath = "/x" }, api.VolumeRefused},
		{"attached", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.PublishContext = map[string]string{"a": "b"} }, api.VolumeRefused},
		{"no id", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeId = "" }, api.VolumeRefused},
		{"long id", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeId += "0" }, api.VolumeRefused},
		{"id with a path", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeId = "csi-" + strings.Repeat("../", 21) + "a"
		}, api.VolumeRefused},

		{"elsewhere", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath = "/etc/x/mount" }, api.VolumeTarget},
		{"no path", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath = "" }, api.VolumeTarget},
		{"not mount", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath += "s" }, api.VolumeTarget},
		{"below mount", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath += "/mount" }, api.VolumeTarget},
		{"slash at the end", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath += "/" }, api.VolumeTarget},
		{"dots as a name", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/signet/", "/../", 1)
		}, api.VolumeTarget},
		{"dots in the path", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/volumes/", "/../"+p.UID+"/volumes/", 1)
		}, api.VolumeTarget},
		{"dots as the UID", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), p.UID, "..", 1)
		}, api.VolumeTarget},
		{"two slashes", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/volumes/", "//volumes/", 1)
		}, api.VolumeTarget},
		{"name with NUL", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/signet/", "/sig\x00net/", 1)
		}, api.VolumeTarget},
		{"long name", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/signet/", "/"+strings.Repeat("a", 64)+"/", 1)
		}, api.VolumeTarget},
		{"long path", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "/signet/", "/"+strings.Repeat("a", 5000)+"/", 1)
		}, api.VolumeTarget},
		{"another driver's kind", func(k *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.TargetPath = strings.Replace(k.target(p), "kubernetes.io~csi", "kubernetes.io~empty-dir", 1)
		}, api.VolumeTarget},
		{"folder of another pod", func(k *kubelet, r *csipb.NodePublishVolumeRequest) { r.TargetPath = k.target(other) }, api.VolumeTarget},

		{"token of another pod", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.Secrets[keyTokens] = tokensJSON(audience, other.token(1))
		}, api.PodMismatch},
		{"pod under another name", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyPodName] = "other" }, api.PodMismatch},
		{"another account", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyAccount] = "other" }, api.PodMismatch},
		{"no token", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.Secrets = nil }, api.TokenMissing},
		{"a token as an attribute alone", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeContext[keyTokens], r.Secrets = r.Secrets[keyTokens], nil
		}, api.VolumeRefused},
		{"a token as an attribute, too", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.VolumeContext[keyTokens] = r.Secrets[keyTokens]
		}, api.VolumeRefused},
		{"a secret of the pod's author", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) { r.Secrets["password"] = "x" }, api.VolumeRefused},
		{"only such a secret", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.Secrets = map[string]string{"token": r.Secrets[keyTokens]}
		}, api.VolumeRefused},
		{"wrong audience", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.Secrets[keyTokens] = tokensJSON("signet:other.org", p.token(1))
		}, api.TokenAudience},
		{"two tokens", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.Secrets[keyTokens] = tokensJSON(audience, p.token(1), audience, other.token(1))
		}, api.TokenAmbiguous},
		{"huge tokens", func(_ *kubelet, r *csipb.NodePublishVolumeRequest) {
			r.Secrets[keyTokens] = tokensJSON(audience, strings.Repeat("a", maxTokens))
		}, api.TokenTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			req := good(r.k)
			tc.change(r.k, req)
			wantError(t, r.k.publish(p, req), tc.reason)
			r.clean(p)
			if left := r.records(); len(left) != 0 || r.identities.open() != 0 {
				t.Errorf("remembered %v, %d identities", left, r.identities.open())
			}
			if err := r.k.removeOrphan(p); err != nil {
				t.Error(err)
			}
			if strings.Contains(r.logs.String(), "INTERNAL") {
				t.Error("it was internal")
			}
			// The same again for a volume that is there: it stays as it was.
			r.publish(p, 1)
			c := r.served(p)
			before := tree(t, r.k.dir)
			if tc.reason != api.PodMismatch && tc.name != "folder of another pod" {
				wantError(t, r.k.publish(p, req), tc.reason)
			} else if err := r.k.publish(p, req); err == nil {
				t.Error("it was taken the second time")
			}
			sameTree(t, before, tree(t, r.k.dir))
			alive(t, c)
			r.served(p)
		})
	}
}

// With a CSIDriver object of old, the token comes as an attribute, and a secret with one is the pod's author's.
func TestTokenInVolumeContext(t *testing.T) {
	r := newRig(t, func(c *Config) { c.TokenIn = InVolumeContext })
	p := testPod(1)
	req := r.k.request(p, p.token(1))
	wantError(t, r.k.publish(p, req), api.VolumeRefused)
	both := proto.CloneOf(req)
	both.VolumeContext[keyTokens] = both.Secrets[keyTokens]
	wantError(t, r.k.publish(p, both), api.VolumeRefused)
	none := proto.CloneOf(req)
	none.Secrets = nil
	wantError(t, r.k.publish(p, none), api.TokenMissing)
	both.Secrets = nil
	if err := r.k.publish(p, both); err != nil {
		t.Fatal(err)
	}
	r.served(p)
}

// A volume has one place and a place one volume.
func TestOtherVolume(t *testing.T) {
	r := newRig(t)
	p, q := testPod(1), testPod(2)
	r.publish(p, 1)
	req := r.k.request(p, p.token(1))
	req.VolumeId = q.id()
	wantError(t, r.k.publish(p, req), api.VolumeRefused)
	req = r.k.request(q, q.token(1))
	req.VolumeId = p.id()
	wantError(t, r.k.publish(q, req), api.VolumeRefused)
	r.k.node(func(c csipb.NodeClient) {
		for _, u := range []*csipb.NodeUnpublishVolumeRequest{
			{VolumeId: q.id(), TargetPath: r.k.target(p)}, {VolumeId: p.id(), TargetPath: r.k.target(q)},
		} {
			_, err := c.NodeUnpublishVolume(t.Context(), u)
			wantError(t, err, api.VolumeRefused)
		}
		for _, u := range []*csipb.NodeUnpublishVolumeRequest{{VolumeId: p.id(), TargetPath: "/etc/mount"}, {VolumeId: p.id(), TargetPath: r.k.dir}} {
			_, err := c.NodeUnpublishVolume(t.Context(), u)
			wantError(t, err, api.VolumeTarget)
		}
	})
	r.served(p)
}

// Who knows the tokens may refuse the next one, or be slow: what is there stays.
func TestIdentitiesRefuse(t *testing.T) {
	r := newRig(t)
	p, q := testPod(1), testPod(2)
	r.publish(p, 1)
	r.identities.mu.Lock()
	r.identities.refuse = api.E(api.NodeMismatch, "the token's pod runs on another node")
	r.identities.mu.Unlock()
	wantError(t, r.k.publish(p, r.k.request(p, p.token(2))), api.NodeMismatch)
	r.served(p)
	wantError(t, r.k.publish(q, r.k.request(q, q.token(1))), api.NodeMismatch)
	r.clean(q)
	if err := r.k.deletePod(p); err != nil {
		t.Error(err)
	}
}

// The system does not let the socket be made: nothing is left, kubelet is told to come back, and a socket that was there
// already stays as it is.
func TestBindFails(t *testing.T) {
	var fail atomic.Bool
	r := newRig(t, func(c *Config) {
		bind := c.Bind
		c.Bind = func(path string) (*net.UnixListener, error) {
			if fail.Load() {
				return nil, &net.OpError{Op: "listen", Net: "unix", Err: syscall.EMFILE}
			}
			return bind(path)
		}
	})
	p, q := testPod(1), testPod(2)
	r.publish(q, 1)
	fail.Store(true)
	err := r.k.publish(p, r.k.request(p, p.token(1)))
	wantError(t, err, api.VolumeFailed)
	if !strings.Contains(status.Convert(err).Message(), "too many open files") || final(err) {
		t.Errorf("error %v", err)
	}
	r.clean(p)
	if n := r.identities.open(); n != 1 {
		t.Errorf("%d identities are open", n)
	}
	r.publish(q, 2)
	r.served(q)
	fail.Store(false)
	r.publish(p, 1)
	r.served(p)
}

var tokenSeeds = []struct {
	text   string
	reason api.Reason // empty: taken
}{
	{`{"signet:example.org":{"token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, ""},
	{`{"x":{"token":"1","expirationTimestamp":"2030-01-02T15:04:05Z"},"signet:example.org":{"expirationTimestamp":"2030-01-02T15:04:05Z","token":"a.b.c"}}`, ""},
	{`{"signet:example.org":{"token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z"}} x`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z"}}{}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a.b.c","token":"d","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"Token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a.b.c"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a.b.c","expirationTimestamp":"tomorrow"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z","more":1}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":["a"],"expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"a\nb","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":{"token":"\u00e4","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenMalformed},
	{`{"signet:example.org":"a.b.c"}`, api.TokenMalformed},
	{`{"SIGNET:EXAMPLE.ORG":{"token":"a.b.c","expirationTimestamp":"2030-01-02T15:04:05Z"}}`, api.TokenAudience},
	{`{}`, api.TokenAudience},
	{`[]`, api.TokenMalformed},
	{`null`, api.TokenMalformed},
	{`{`, api.TokenMalformed},
	{`{"a"`, api.TokenMalformed},
	{`{"a":{"token"`, api.TokenMalformed},
	{``, api.TokenMalformed},
	{strings.Repeat("[", 100000), api.TokenMalformed},
	{"{" + strings.TrimSuffix(strings.Repeat(`"%":{"token":"1","expirationTimestamp":"2030-01-02T15:04:05Z"},`, 2), ",") + "}", api.TokenAmbiguous},
}

func TestTokens(t *testing.T) {
	for _, tc := range tokenSeeds {
		token, err := parseTokens(tc.text, audience)
		if tc.reason == "" && (err != nil || string(token) != "a.b.c") || tc.reason != "" && api.ReasonOf(err) != tc.reason {
			t.Errorf("%.80s: %q, %v, want %s", tc.text, token, err, tc.reason)
		}
	}
	var many []string
	for n := range maxAudiences + 1 {
		many = append(many, fmt.Sprint("a", n), "t")
	}
	if _, err := parseTokens(tokensJSON(many...), audience); api.ReasonOf(err) != api.TokenMalformed {
		t.Errorf("too many audiences: %v", err)
	}
	if _, err := parseTokens(tokensJSON(audience, strings.Repeat("a", api.MaxTokenBytes+1)), audience); api.ReasonOf(err) != api.TokenTooLarge {
		t.Errorf("a token that is too large: %v", err)
	}
}

func FuzzTokens(f *testing.F) {
	for _, s := range tokenSeeds {
		f.Add(s.text)
	}
	f.Fuzz(func(t *testing.T, s string) {
		token, err := parseTokens(s, audience)
		if err != nil {
			if r := api.ReasonOf(err); r == api.Internal {
				t.Fatalf("internal: %v", err)
			}
			return
		}
		if len(token) == 0 || len(token) > api.MaxTokenBytes || strings.ContainsAny(string(token), " \n\x00") {
			t.Fatalf("token %q", token)
		}
		if !strings.Contains(s, `"`) || strings.TrimSpace(s)[0] != '{' {
			t.Fatalf("a token out of %q", s)
		}
	})
}

// Whatever a call holds, it ends with a volume at its own place or with a reason, and nothing outside is touched.
func FuzzPublish(f *testing.F) {
	p := testPod(1)
	dir := f.TempDir()
	k := newKubelet(f, dir+"/kubelet")
	d, err := New(testConfig(dir, newIdentities()))
	if err != nil {
		f.Fatal(err)
	}
	d.running = f.Context()
	if err := os.MkdirAll(k.parent(p), 0o750); err != nil {
		f.Fatal(err)
	}
	add := func(change func(*csipb.NodePublishVolumeRequest)) {
		req := k.request(p, p.token(1))
		req.TargetPath = strings.Replace(req.TargetPath, k.dir, "KUBELET", 1)
		change(req)
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	add(func(*csipb.NodePublishVolumeRequest) {})
	add(func(r *csipb.NodePublishVolumeRequest) { r.Readonly = false })
	add(func(r *csipb.NodePublishVolumeRequest) {
		r.TargetPath = "KUBELET/pods/../volumes/kubernetes.io~csi/x/mount"
	})
	add(func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext[keyTokens] = "x" })
	f.Fuzz(func(t *testing.T, data []byte) {
		req := &csipb.NodePublishVolumeRequest{}
		if proto.Unmarshal(data, req) != nil {
			return
		}
		req.TargetPath = strings.Replace(req.TargetPath, "KUBELET", k.dir, 1)
		before := proto.CloneOf(req)
		_, err := (&nodeServer{d: d}).NodePublishVolume(t.Context(), req)
		if !proto.Equal(before, req) {
			t.Error("the call was changed")
		}
		if err != nil {
			if api.ReasonOf(err) == api.Internal {
				t.Fatalf("internal: %v", err)
			}
			return
		}
		u := &csipb.NodeUnpublishVolumeRequest{VolumeId: req.GetVolumeId(), TargetPath: req.GetTargetPath()}
		if _, err := (&nodeServer{d: d}).NodeUnpublishVolume(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(req.GetVolumeContext(), before.GetVolumeContext()) || req.GetVolumeContext()[keyPodUID] != p.UID || !req.GetReadonly() {
			t.Fatalf("taken: %v", req.GetVolumeContext())
		}
		if _, err := os.Lstat(k.target(p)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("left: %v", err)
		}
	})
}
