package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestCheckUpgrade: a CA that cannot read its record is bad, and agents of another version are worth a word.
//
// threat: E23
func TestCheckUpgrade(t *testing.T) {
	image := func(part string) []any { return []any{object{"name": "x", "image": part}} }
	for _, tc := range []struct {
		name          string
		record, reads any // annotations; nil: none
		ca, agent     string
		result, says  string
	}{
		{"as installed", nil, "2", "localhost/signet-ca:v1", "localhost/signet-agent:v1", resultGood, "of version v1"},
		{"the same schema", "2", "2", "host:5000/signet-ca:v1", "host:5000/signet-agent:v1", resultGood, "reads its record"},
		{"an older record", "1", "2", "localhost/signet-ca:v1", "localhost/signet-agent:v1", resultGood, "reads its record"},
		{"a newer record", "3", "2", "localhost/signet-ca:v1", "localhost/signet-agent:v1", resultBad, "this version v1 reads up to 2: it does not start (STATE_NEWER)"},
		{"a newer record, and a version that says nothing", "2", nil, "localhost/signet-ca:v0", "localhost/signet-agent:v0", resultBad, "reads up to 1"},
		{"somebody's annotation", "many", "2", "localhost/signet-ca:v1", "localhost/signet-agent:v1", resultGood, "reads its record"},
		{"agents behind", "2", "2", "localhost/signet-ca:v2", "localhost/signet-agent:v1", resultWarning, "the CA is of version v2 and the agents are of v1"},
		{"by digest", "2", "2", "localhost/signet-ca@sha256:00", "localhost/signet-agent:v1", resultGood, "versions are not compared"},
		{"no tag", "2", "2", "localhost:5000/signet-ca", "localhost/signet-agent:v1", resultGood, "versions are not compared"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCluster(t)
			defer c.Close()
			c.set(pathBundle, tc.record, "metadata", "annotations", annotationSchema)
			c.set(pathStatefulSet, tc.reads, "metadata", "annotations", annotationSchema)
			c.set(pathStatefulSet, image(tc.ca), "spec", "template", "spec", "containers")
			c.set(pathDaemonSet, image(tc.agent), "spec", "template", "spec", "containers")
			r, _, _ := lookAt(t, c)
			rows := r.rows("upgrade")
			if len(rows) != 1 || rows[0].Result != tc.result || !strings.Contains(rows[0].Found, tc.says) || (rows[0].Do == "") != (tc.result == resultGood) {
				t.Errorf("got %+v", rows)
			}
		})
	}
	t.Run("not there", func(t *testing.T) {
		c := newCluster(t)
		defer c.Close()
		c.remove(pathDaemonSet)
		if r, _, _ := lookAt(t, c); len(r.rows("upgrade")) > 0 {
			t.Errorf("it tells what others do: %+v", r.rows("upgrade"))
		}
	})
}

// TestCheckOldConfiguration: what a ConfigMap says is not what the CA does before it was started anew.
func TestCheckOldConfiguration(t *testing.T) {
	started := testNow.Add(-time.Hour)
	by := func(at time.Time, field string) object {
		return object{"manager": "kubectl", "time": at.Format(time.RFC3339), "fieldsV1": object{field: object{}}}
	}
	for name, tc := range map[string]struct {
		fields []any
		says   string // empty: nothing
	}{
		"nobody says when":          {nil, ""},
		"before":                    {[]any{by(started.Add(-time.Minute), "f:data")}, ""},
		"with it":                   {[]any{by(started, "f:data")}, ""},
		"after":                     {[]any{by(started.Add(-time.Minute), "f:data"), by(started.Add(time.Minute), "f:data")}, "is let in still"},
		"another field after":       {[]any{by(started.Add(-time.Minute), "f:data"), by(started.Add(time.Minute), "f:metadata")}, ""},
		"without a time, and after": {[]any{object{"time": nil}, by(started.Add(time.Minute), "f:data")}, "is let in still"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			defer c.Close()
			c.set(sys+"/configmaps/signet-ca", tc.fields, "metadata", "managedFields")
			c.set(sys+"/pods/signet-ca-0", []any{object{"name": "ca", "ready": true, "state": object{"running": object{"startedAt": started.Format(time.RFC3339)}}}}, "status", "containerStatuses")
			r, _, _ := lookAt(t, c)
			said := slices.ContainsFunc(r.rows("ca"), func(row *checkRow) bool {
				return row.Result == resultWarning && strings.Contains(row.Found, "is let in still") && strings.Contains(row.Do, "rollout restart statefulset signet-ca")
			})
			if said != (tc.says != "") {
				t.Errorf("got %+v", r.rows("ca"))
			}
		})
	}
}

func TestLastWords(t *testing.T) {
	const newer = "signet-ca: the record has schema 3, this build knows 2 (STATE_NEWER, SGN-0803)"
	for _, tc := range []struct{ name, said, want string }{
		{"nothing", "", ""},
		{"one line", "exec format error\n", "exec format error"},
		{"the last of several", "one\ntwo\n\nthree\n\n", "three"},
		{"ours", "{\"msg\":\"starting\"}\n" + newer + "\n  why:  Its schema is higher.\n  more: signet explain SGN-0803\n", newer},
		{"ours, the last", "signet-ca: x (CONFIG_INVALID, SGN-0901)\n" + newer + "\n  next: wait", newer},
		{"cut at its beginning", "igher.\n  more: signet explain SGN-0803\n", "more: signet explain SGN-0803"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := lastWords(tc.said); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
