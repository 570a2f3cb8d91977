package main

import (
	"encoding/json"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Whatever a ConfigMap holds, it is a bundle of at least one root, or it is told as none.
func FuzzPublished(f *testing.F) {
	c := newCluster(f)
	c.Close()
	data := c.objects[pathBundle]["data"].(object)
	f.Add(data[bundleJSON].(string), data[bundlePEM].(string))
	f.Add(`{"keys":[],"spiffe_sequence":1}`, "")
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	f.Fuzz(func(t *testing.T, doc, pem string) {
		b, err := parsePublished(td, map[string]string{bundleJSON: doc, bundlePEM: pem})
		if err == nil && len(b.roots) == 0 {
			t.Error("a bundle without roots")
		}
		if err == nil {
			i := &checkup{a: &app{}, now: testNow, report: &checkReport{}, kf: &kubeFlags{}}
			i.checkRoots(b.roots)
			if len(i.report.Items) == 0 {
				t.Error("nothing is said of its roots")
			}
			b.domains()
		}
	})
}

// Whatever a pod's status says, what is repeated of it is short, and a line to type is one.
func FuzzPod(f *testing.F) {
	f.Add(`{"metadata":{"name":"x","deletionTimestamp":"2026-11-24T11:00:00Z","ownerReferences":[{"controller":true,"kind":"ReplicaSet","name":"x-1"}],"labels":{"pod-template-hash":"1"}},
		"spec":{"volumes":[{"csi":{"driver":"csi.signet.dev"}},{}]},"status":{"phase":"Failed","containerStatuses":[{"state":{"terminated":{"exitCode":1,"message":"a\nb"}}}]}}`)
	f.Add(`{"metadata":{"name":"-;x"},"status":{"containerStatuses":[{"name":"--x=;"}]}}`)
	f.Add(`{"status":{"initContainerStatuses":[{"name":"$(x)","state":{"waiting":{"reason":"x"}},"lastState":{"terminated":{}}}]}}`)
	f.Fuzz(func(t *testing.T, text string) {
		var p kPod
		if json.Unmarshal([]byte(text), &p) != nil {
			return
		}
		i := &checkup{a: &app{name: "signet"}, now: testNow, kf: &kubeFlags{namespace: defaultNamespace}}
		p.finished(testNow)
		p.controller()
		p.volume(driverName)
		i.stuck(&p)
		for _, c := range p.Status.Containers {
			if said := containerTrouble(c); len(said) > 4*maxFound {
				t.Errorf("it says %d bytes", len(said))
			}
			line := i.kf.kubectl("-n", p.Metadata.Namespace, "logs", p.Metadata.Name, "-c", c.Name)
			for _, r := range line {
				if !safeWord.MatchString("x"+string(r)) && r != ' ' {
					t.Errorf("%q is in the line %q", r, line)
				}
			}
		}
	})
}
