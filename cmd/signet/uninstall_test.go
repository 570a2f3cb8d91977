package main

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// remove runs uninstall against c and returns the plan, the exit code and the talk.
func remove(t *testing.T, c *fakeCluster, args ...string) (p uninstallPlan, code int, talk string) {
	t.Helper()
	path, err := c.kubeconfig(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	a, stdout, stderr := newTestApp(nil)
	code = a.main(append([]string{"signet", "uninstall", "--kubeconfig", path, "-o", "json"}, args...))
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &p); err != nil {
			t.Fatalf("%v in %s", err, stdout)
		}
	}
	return p, code, stderr.String()
}

// Whatever `signet install` makes, uninstall removes, but for the namespace; and nothing else.
func TestUninstallAll(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("free")
	var installed []string
	for path, o := range c.objects {
		labels, _ := o["metadata"].(object)["labels"].(object)
		ours := labels[labelPartOf] == "signet" && o["kind"] != "Namespace" && o["kind"] != "Pod"
		if ours && !strings.HasSuffix(path, "/"+bundleName) {
			installed = append(installed, path)
		}
	}
	if len(installed) < 15 {
		t.Fatalf("only %d objects are installed", len(installed))
	}
	if _, code, talk := remove(t, c, "--yes"); code != exitGood {
		t.Fatalf("exit code %d: %s", code, talk)
	}
	if c.deleted[0] != pathDriver || c.deleted[1] != pathDaemonSet || c.deleted[2] != pathStatefulSet {
		t.Errorf("deleted first: %v", c.deleted[:3])
	}
	slices.Sort(installed)
	slices.Sort(c.deleted)
	if !slices.Equal(installed, c.deleted) {
		t.Errorf("installed:\n%s\ndeleted:\n%s", strings.Join(installed, "\n"), strings.Join(c.deleted, "\n"))
	}
}

// Every kind of object that the chart can make, with whatever values, is looked for.
func TestUninstallKinds(t *testing.T) {
	files, err := filepath.Glob("../../deploy/chart/signet/templates/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no templates", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "helm.sh/hook:") {
			continue // Helm's own, and there only while Helm uninstalls
		}
		for _, m := range regexp.MustCompile(`(?m)^kind: (.*)$`).FindAllStringSubmatch(string(text), -1) {
			known := m[1] == "Namespace" // which stays
			for _, k := range chartKinds {
				known = known || k.kind == m[1]
			}
			if !known {
				t.Errorf("%s makes a %s, which uninstall does not look for", file, m[1])
			}
		}
	}
}

// With the state, nothing is left but the namespace; and the same command again goes on where it was ended.
//
// threat: L13
func TestUninstallState(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("free")
	c.mu.Lock()
	c.add(object{"apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": object{"name": "signet.dev:bundle:cluster.local"}})
	c.mu.Unlock()
	const claim = sys + "/persistentvolumeclaims/seal-signet-ca-0"
	c.answer(claim, func(w http.ResponseWriter) { c.fail(w, 500, "etcd is away") })
	if _, code, _ := remove(t, c, "--yes", "--delete-state", "cluster.local"); code != exitFailed {
		t.Fatalf("exit code %d", code)
	}
	c.answer(claim, nil)
	if _, code, talk := remove(t, c, "--yes", "--delete-state", "cluster.local"); code != exitGood {
		t.Fatalf("exit code %d: %s", code, talk)
	}
	for path, o := range c.objects {
		labels, _ := o["metadata"].(object)["labels"].(object)
		switch {
		case o["kind"] == "PersistentVolumeClaim" || o["kind"] == "ClusterTrustBundle" || strings.HasSuffix(path, bundleName):
			t.Errorf("left: %s", path)
		case labels[labelPartOf] == "signet" && o["kind"] != "Namespace":
			t.Errorf("left: %s", path)
		}
	}
}

// Pods in the way are those that kubelet may have to take the volume from.
func TestUninstallPods(t *testing.T) {
	const web = "/api/v1/namespaces/shop/pods/web-1"
	ended := func(at string) object {
		return object{"phase": "Succeeded", "containerStatuses": []any{object{"state": object{"terminated": object{"finishedAt": at}}}}}
	}
	for _, tt := range []struct {
		name   string
		change func(*fakeCluster)
		want   int
	}{
		{"running", func(*fakeCluster) {}, 1},
		{"not on a node yet", func(c *fakeCluster) { c.set(web, nil, "spec", "nodeName") }, 1},
		{"ending", func(c *fakeCluster) { c.set(web, "2026-11-24T11:00:00Z", "metadata", "deletionTimestamp") }, 1},
		{"ended a moment ago", func(c *fakeCluster) { c.set(web, ended("2026-11-24T11:59:30Z"), "status") }, 1},
		{"ended", func(c *fakeCluster) { c.set(web, ended("2026-11-24T11:50:00Z"), "status") }, 0},
		{"of another driver", func(c *fakeCluster) {
			c.set(web, []any{object{"name": "id", "csi": object{"driver": "csi.example"}}}, "spec", "volumes")
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t)
			defer c.Close()
			tt.change(c)
			p, code, _ := remove(t, c)
			if len(p.Pods) != tt.want || code != []int{exitGood, exitFindings}[tt.want] {
				t.Errorf("%d pods, exit code %d", len(p.Pods), code)
			}
		})
	}
}

// A pod that comes while the driver goes keeps the agents alive.
func TestUninstallRace(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("free")
	c.onLoss[pathDriver] = func() {
		c.add(object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": "late", "namespace": "shop"},
			"spec": object{"nodeName": "node-1", "volumes": []any{object{"csi": object{"driver": driverName}}}}, "status": object{"phase": "Pending"}})
	}
	_, code, talk := remove(t, c, "--yes")
	if code != exitFindings || len(c.deleted) != 1 || !strings.Contains(talk, "shop/late") || !strings.Contains(talk, "signet install | kubectl") {
		t.Fatalf("exit code %d, deleted %v: %s", code, c.deleted, talk)
	}
	c.remove("/api/v1/namespaces/shop/pods/late")
	if _, code, talk := remove(t, c, "--yes"); code != exitGood {
		t.Errorf("exit code %d: %s", code, talk)
	}
}

// What was made anew since the look is left alone.
func TestUninstallReinstalled(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("free")
	c.onLoss[pathDriver] = func() { c.objects[pathStatefulSet]["metadata"].(object)["uid"] = "another" }
	_, code, talk := remove(t, c, "--yes")
	if code != exitFailed || !strings.Contains(talk, "made anew") || c.objects[pathStatefulSet] == nil {
		t.Errorf("exit code %d: %s", code, talk)
	}
}

// --pods-only names pods in the way with no other right than to list them, and never deletes anything.
func TestUninstallPodsOnly(t *testing.T) {
	for _, tt := range []struct {
		name, play string
		args       []string
		code       int
		says       string
	}{
		{"in the way", "good", nil, exitFindings, "with the volume: shop/web-1\n"},
		{"after waiting", "good", []string{"--wait=100ms"}, 124, "with the volume: shop/web-1\n"},
		{"none", "free", nil, exitGood, "no pod has the volume\n"},
		{"none to wait for", "free", []string{"--wait=1m"}, exitGood, "no pod has the volume\n"},
		{"not allowed to look", "forbidden", nil, exitFailed, "list the pods of all namespaces"},
		{"with --yes", "free", []string{"--yes"}, exitUsage, "--pods-only deletes nothing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t)
			defer c.Close()
			c.play(tt.play)
			for path := range c.objects {
				if !strings.Contains(path, "/pods/") {
					c.answer(path, func(w http.ResponseWriter) { c.fail(w, 403, "no right to it") })
				}
			}
			for _, k := range chartKinds {
				c.answer(in(k.apiVersion, "", k.resource, ""), func(w http.ResponseWriter) { c.fail(w, 403, "no right to it") })
				c.answer(in(k.apiVersion, "signet-system", k.resource, ""), func(w http.ResponseWriter) { c.fail(w, 403, "no right to it") })
			}
			p, code, talk := remove(t, c, append(tt.args, "--pods-only")...)
			if code != tt.code || !strings.Contains(talk, tt.says) || len(c.deleted)+len(p.Delete)+len(p.Keep) > 0 {
				t.Errorf("exit code %d: %s", code, talk)
			}
		})
	}
}

// --wait goes on once the last pod has gone.
func TestUninstallWait(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	looks := 0
	c.answer("/api/v1/pods", func(w http.ResponseWriter) {
		looks++
		switch looks {
		case 1, 2:
			c.send(w, 200, object{"items": []any{c.objects["/api/v1/namespaces/shop/pods/web-1"]}})
		case 3: // that nobody could look does not mean that nobody is there
			c.fail(w, 500, "etcd is away")
		default:
			c.send(w, 200, object{"items": []any{}})
		}
	})
	p, code, talk := remove(t, c, "--wait=1m", "--yes")
	if code != exitGood || len(c.deleted) == 0 || !p.Delete[0].Deleted || !strings.Contains(talk, `"state":"good","what":"shop/pod/web-1"`) {
		t.Errorf("exit code %d: %s", code, talk)
	}
}

// A mistyped namespace does not take the cluster's objects of another one; one whose namespace was deleted by hand does.
func TestUninstallNamespace(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("free")
	if p, code, talk := remove(t, c, "-n", "elsewhere", "--yes"); code != exitGood || len(p.Delete)+len(c.deleted) > 0 {
		t.Fatalf("exit code %d, deleted %v: %s", code, c.deleted, talk)
	}
	for path, o := range c.objects {
		if o["metadata"].(object)["namespace"] == "signet-system" {
			delete(c.objects, path)
		}
	}
	p, code, talk := remove(t, c, "--yes")
	if code != exitGood || len(p.Delete) < 5 || len(c.deleted) != len(p.Delete) || p.TrustDomain != "" {
		t.Errorf("exit code %d, deleted %v: %s", code, c.deleted, talk)
	}
}
