package deploy_test

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/signet-ca/signet/deploy"
)

// Whatever is given is refused, or stands in the manifests as the text that it is: they keep their objects and each its
// place.
func FuzzInstall(f *testing.F) {
	d := deploy.Defaults()
	f.Add(d.TrustDomain, d.Issuer, d.Repository, d.Tag, d.PullPolicy, d.KubeletDir)
	f.Add("1.20", "https://a/%0a", "5", "1e3", "Never", "/1/.2")
	f.Add("a\"\n---\nb", "https://a\" # ", "a: b", "@TAG@", "always", "/../")
	f.Fuzz(func(t *testing.T, td, issuer, repository, tag, policy, dir string) {
		text, err := deploy.Install(deploy.Options{TrustDomain: td, Issuer: issuer, Repository: repository, Tag: tag, PullPolicy: policy, KubeletDir: dir})
		if err != nil {
			return
		}
		for given, otherwise := range map[*string]string{&td: d.TrustDomain, &issuer: d.Issuer, &repository: d.Repository, &tag: d.Tag, &policy: d.PullPolicy, &dir: d.KubeletDir} {
			if *given == "" {
				*given = otherwise
			}
		}
		all := objects(t, text)
		if got := one[*storagev1.CSIDriver](t, all).Spec.TokenRequests[0].Audience; got != "signet:"+td {
			t.Errorf("the audience of tokens is %q", got)
		}
		c := one[*appsv1.DaemonSet](t, all).Spec.Template.Spec.Containers[0]
		if want := repository + "/signet-agent:" + tag; c.Image != want || string(c.ImagePullPolicy) != policy {
			t.Errorf("the image is %q, %s", c.Image, c.ImagePullPolicy)
		}
		if got := kubeletDir(t, all); got != dir {
			t.Errorf("kubelet's folder is %q", got)
		}
		for _, m := range of[*corev1.ConfigMap](all) {
			if ca := m.Data["ca.yaml"]; ca != "" && !strings.Contains(ca, "- issuer: \""+issuer+"\"\n") {
				t.Errorf("the issuer is not in %s", ca)
			}
		}
	})
}
