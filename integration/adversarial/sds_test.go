package adversarial

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/sds"
)

type discoveryNode = corev3.Node

// TestSDS asks a node's socket for what its caller may not have, in each protocol. The CA has issued one SVID at the end,
// the caller's own.
//
// threat: A01, A22, B01, D01, D02, D03, D04, D05, D08, D11, D20
func TestSDS(t *testing.T) {
	s := newSocket(t)
	good := []string{"Bearer " + string(s.token())}
	own := []string{sds.NameDefault, sds.NameRootCA}
	for _, protocol := range protocols {
		s.ask("D20", "untouched", protocol, good, question{kind: sds.TypeURL, names: []string{sds.NameDefault, sds.NameRootCA}}, own)
	}
	before := s.ledger.issued()
	for _, protocol := range protocols {
		s.names(protocol, good)
		s.kinds(protocol, good)
		s.nodes(protocol, good)
		s.tokens(protocol)
	}
	s.sequences(good)
	s.messages(good)
	if now := s.ledger.issued(); now != before {
		t.Errorf("%d SVIDs were issued meanwhile", now-before)
	}
	if t.Logf("%d variants", s.count); s.count < 700 {
		t.Errorf("%d variants, want at least 700", s.count)
	}
}

func (s *socket) names(protocol string, good []string) {
	own := []string{sds.NameDefault, sds.NameRootCA, sds.NameAll, webID, "spiffe://example.org"}
	ask := func(row, name string, names []string, serves []string, want ...api.Reason) {
		s.t.Helper()
		s.ask(row, name, protocol, good, question{kind: sds.TypeURL, names: names}, serves, want...)
	}
	for _, name := range own {
		ask("D03", "own name "+name, []string{name}, []string{name})
	}
	ask("D03", "no name", nil, own[:2])
	ask("D03", "star", []string{"*"}, own[:2])
	ask("D03", "star and star", []string{"*", "*"}, own[:2])
	ask("D03", "star and own", []string{"*", webID}, own)
	for what, name := range sorted(map[string]string{
		"neighbour": "spiffe://example.org/ns/" + stranger + "/sa/db", "prefix": "spiffe://example.org/ns/shop/sa/we", "suffix": webID + "x", "case": "spiffe://example.org/ns/shop/sa/Web", "agent": "spiffe://example.org/signet/agent/" + s.pod.NodeUID,
		"replica": "spiffe://example.org/signet/ca/ca-0", "another trust domain": "spiffe://" + stranger + ".test", "its workload": "spiffe://" + stranger + ".test/ns/shop/sa/web", "a word": stranger, "a kubernetes secret": "kubernetes", "a file's name": "tls.key", "default in upper case": "DEFAULT",
		"rootca": "rootca", "all": "all", "istio": "file-root", "a number": "1",
	}) {
		ask("D01", what, []string{name}, nil, api.ResourceNotAuthorized)
		ask("D01", what+" twice", []string{name, name}, nil, api.ResourceNotAuthorized)
		ask("D01", what+" and own", []string{name, sds.NameDefault}, own[:1])
		ask("D01", what+" behind own", []string{sds.NameRootCA, name}, own[1:2])
	}
	for what, name := range sorted(map[string]string{
		"file": "file-cert:/etc/shadow~/etc/passwd", "file root": "file-root:/etc/passwd", "dots": "../../etc/passwd", "absolute": "/etc/passwd", "dot": ".", "two dots": "..", "NUL": "default\x00", "NUL first": "\x00", "newline": "default\n", "space": "default ", "tab": "\tdefault",
		"64 KiB": strings.Repeat("a", 64<<10), "2049 bytes": strings.Repeat("a", 2049), "URL": "https://example.org/x", "no trust domain": "spiffe://", "empty path": "spiffe:///x", "trailing slash": webID + "/", "two dots in an ID": "spiffe://example.org/ns/../x", "percent": webID + "%2f", "query": webID + "?x", "fragment": webID + "#x", "port": "spiffe://example.org:1/x",
		"user": "spiffe://a@example.org/x", "Cyrillic": "dеfault", "joiner": "default\u200d", "right to left": "\u202edefault", "semicolon": "default;x", "comma": "default,ROOTCA", "quote": `"default"`, "backslash": `..\x`, "glob": "def*", "two stars": "**", "shell": "$(id)", "brace": "{default}", "hyphen first": "-default", "colon": ":", "empty": "",
		"trust domain of 256 bytes": "spiffe://" + strings.Repeat("a", 256), "xdstp": "xdstp://example.org/x", "kubernetes": "kubernetes://shop/tls", "log line": "x\n{\"level\":\"error\"}",
	}) {
		ask("D02", what, []string{name}, nil, api.ResourceName)
		ask("D02", what+" behind own", []string{sds.NameDefault, name}, nil, api.ResourceName)
	}
	many := func(n int, f string) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf(f, i))
		}
		return names
	}
	for _, n := range []int{65, 66, 128, 1000, 10_000} {
		ask("D08", fmt.Sprint(n, " words"), many(n, "w%d"), nil, api.TooManyResources)
		ask("D08", fmt.Sprint(n, " IDs"), many(n, "spiffe://example.org/ns/"+stranger+"/sa/x%d"), nil, api.TooManyResources)
	}
	ask("D08", "64 names, one of them own", append(many(63, "w%d"), sds.NameDefault), own[:1])
	ask("D08", "10000 times the same", slices.Repeat([]string{sds.NameDefault}, 10_000), own[:1])
}

func (s *socket) kinds(protocol string, good []string) {
	const v3 = "type.googleapis.com/envoy.config."
	ask := func(kind string, serves []string, want ...api.Reason) {
		s.t.Helper()
		s.ask("D04", clip(kind), protocol, good, question{kind: kind, names: []string{sds.NameDefault}}, serves, want...)
	}
	ask("", []string{sds.NameDefault})
	for _, kind := range []string{
		v3 + "listener.v3.Listener", v3 + "cluster.v3.Cluster", v3 + "route.v3.RouteConfiguration", v3 + "endpoint.v3.ClusterLoadAssignment", "type.googleapis.com/envoy.api.v2.auth.Secret", "type.googleapis.com/envoy.service.runtime.v3.Runtime",
		sds.TypeURL + " ", " " + sds.TypeURL, sds.TypeURL + "\x00", strings.ToUpper(sds.TypeURL), strings.TrimPrefix(sds.TypeURL, "type.googleapis.com/"), "https://" + sds.TypeURL, sds.TypeURL + "s", sds.TypeURL[:len(sds.TypeURL)-1], "/", "*", "x", stranger, strings.Repeat("a", 64<<10),
		"type.googleapis.com/google.protobuf.Any", "file:///etc/passwd", "\n{}",
	} {
		ask(kind, nil, api.TypeURL)
	}
}

func (s *socket) nodes(protocol string, good []string) {
	value := structpb.NewStringValue("x")
	for range 1000 {
		value = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{value}})
	}
	q := func(n *corev3.Node) question {
		return question{kind: sds.TypeURL, names: []string{sds.NameDefault}, node: n}
	}
	fields := func(v *structpb.Value) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{"TOKEN": v}}
	}
	own := []string{sds.NameDefault}
	for what, n := range sorted(map[string]*corev3.Node{
		"64 KiB and a byte": {Id: strings.Repeat("n", 64<<10)}, "900 KiB of metadata": {Metadata: fields(structpb.NewStringValue(strings.Repeat("m", 900<<10)))}, "900 KiB of cluster": {Cluster: strings.Repeat("c", 900<<10)},
	}) {
		s.ask("D11", what, protocol, good, q(n), nil, api.NodeMetadataTooLarge)
	}
	for what, n := range sorted(map[string]*corev3.Node{ // who it says to be means nothing
		"1000 deep": {Metadata: fields(value)}, "somebody else": {Id: "spiffe://example.org/ns/" + stranger + "/sa/db", Cluster: stranger}, "the agent": {Id: "signet-agent"}, "control characters": {Id: "x\n{\"level\":\"error\"}\x1b[31m"}, "an ID in metadata": {Metadata: fields(structpb.NewStringValue("spiffe://example.org/ns/" + stranger + "/sa/db"))},
	}) {
		s.ask("D11", what, protocol, good, q(n), own)
		if log := s.log.take(); strings.ContainsAny(log, "\x1b") {
			s.t.Errorf("%s reached the log as it was: %q", what, log)
		}
	}
}

// tokens shows more than one token, or one that is good for nothing here.
func (s *socket) tokens(protocol string) {
	ask := func(row, name string, want api.Reason, values ...string) {
		s.t.Helper()
		s.ask(row, name, protocol, values, question{kind: sds.TypeURL, names: []string{sds.NameDefault}}, nil, want, api.TokenMalformed)
	}
	good := string(s.token())
	ask("A22", "none", api.TokenMissing)
	ask("A22", "empty", api.TokenMissing, "")
	ask("A22", "only Bearer", api.TokenMissing, "Bearer")
	ask("A22", "Bearer and a space", api.TokenMissing, "Bearer ")
	for what, values := range sorted(map[string][]string{
		"twice": {good, good}, "twice with Bearer": {"Bearer " + good, "Bearer " + good}, "good and empty": {"Bearer " + good, ""}, "empty and good": {"", "Bearer " + good}, "good and bad": {"Bearer " + good, "Bearer x"}, "bad and good": {"Bearer x", "Bearer " + good},
		"three": {good, good, good}, "Bearer twice": {"Bearer Bearer " + good}, "comma": {"Bearer " + good + ", Bearer " + good}, "comma without Bearer": {good + "," + good}, "two with a space": {"Bearer " + good + " " + good}, "Basic": {"Basic " + good}, "two spaces": {"Bearer  " + good},
		"comma behind": {"Bearer " + good + ","}, "scheme behind": {good + " Bearer"},
	}) {
		ask("A22", what, api.TokenAmbiguous, values...)
	}
	for what, v := range sorted(map[string]string{"semicolon": good + ";x", "quotes": `"` + good + `"`, "tilde": good + "~", "padding": good + "=", "cut": good[:20], "word": "x"}) {
		ask("A22", what, api.TokenMalformed, "Bearer "+v)
	}
	audience := api.WorkloadAudience(s.TD)
	for _, c := range []struct {
		row, name string
		change    func(*attestortest.Draft)
		want      api.Reason
	}{
		{"A01", "of the API server", attestortest.Audiences("https://kubernetes.default.svc"), api.TokenAudience},
		{"A01", "of an agent", attestortest.Audiences(api.AgentAudience(s.TD)), api.TokenAudience},
		{"A02", "of two", attestortest.Audiences(audience, stranger), api.TokenAudienceNotExclusive},
		{"A06", "of a year", func(d *attestortest.Draft) { d.Claims["exp"] = d.Claims["iat"].(int64) + 365*86400 }, api.TokenTTLTooLong},
		{"A13", "not bound", func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") }, api.TokenNotPodBound},
		{"A24", "of another cluster", attestortest.Claim("iss", "https://"+stranger+".test"), api.IssuerUnknown},
		{"A20", "none", attestortest.Header("alg", "none"), api.TokenSignature},
		{"A20", "of a key in its header", attestortest.Header("jwk", map[string]any{"kty": "oct"}), api.TokenSignature},
	} {
		ask(c.row, c.name, c.want, "Bearer "+string(s.token(c.change)))
	}
	other := attestortest.NewPod("shop", "far", "web", "node-2")
	s.Pods.Add(other)
	ask("B01", "of a pod on another node", api.NodeMismatch, "Bearer "+string(s.Evidence(other, audience, 3600e9).Data))
}

// sequences says anything in any order on one stream: the answers are no more than the questions, and whoever comes next
// is served.
func (s *socket) sequences(good []string) {
	s.t.Helper()
	rnd := seed(5)
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	for n := range 60 {
		s.count++
		ctx, cancel := context.WithTimeout(s.t.Context(), patience)
		stream, err := s.client.StreamSecrets(metadata.NewOutgoingContext(ctx, metadata.Pairs("authorization", good[0])))
		if err != nil {
			s.t.Fatal(err)
		}
		asked, answered, last := 0, 0, ""
		for range 1 + rnd.IntN(30) {
			r := &discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResponseNonce: pick("", last, "foreign", strings.Repeat("n", 1000), "0000000000000000"), VersionInfo: pick("", "1", stranger)}
			r.ResourceNames = [][]string{nil, {sds.NameDefault}, {sds.NameRootCA}, {sds.NameDefault, sds.NameRootCA}, {webID}, {"*"}}[rnd.IntN(6)]
			if rnd.IntN(3) == 0 {
				r.ErrorDetail = &rpcstatus.Status{Code: 13, Message: pick("no", "\x1b[31m", strings.Repeat("e", 5000))}
			}
			if stream.Send(r) != nil {
				break
			}
			if asked++; asked == 1 { // the first question has an answer; for the others it depends
				resp, err := stream.Recv()
				if err != nil {
					s.t.Errorf("D05 sequence %d: %v", n, err)
					break
				}
				answered, last = answered+1, resp.GetNonce()
			}
		}
		stream.CloseSend()
		for {
			_, err := stream.Recv()
			if err == nil {
				answered++
				continue
			}
			if e := api.FromStatus(err); err != io.EOF && api.ReasonOf(e).Kind() == api.KindInternal {
				s.t.Errorf("D05 sequence %d: %v", n, e)
			}
			break
		}
		cancel()
		if answered > asked {
			s.t.Errorf("D05 sequence %d: %d answers to %d requests", n, answered, asked)
		}
	}
	s.ask("D05", "after the sequences", "sotw", good, question{kind: sds.TypeURL, names: []string{sds.NameDefault}}, []string{sds.NameDefault})
}
