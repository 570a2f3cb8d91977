// Command chart renders the Helm chart in deploy/chart with Helm's own engine, as `helm template --no-hooks` would, for tests
// and for whoever has no Helm at hand.
//
//	chart -set agent.sharedSocket=true | kubectl apply -f -
//
// It is a module of its own: Helm brings a hundred others, and none of them is to reach the product.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"helm.sh/helm/v4/pkg/strvals"
)

// kubeVersion is that of the cluster that is rendered for.
const kubeVersion = "v1.37.2"

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("chart", flag.ContinueOnError)
	flags.SetOutput(stderr)
	dir := flags.String("chart", "../../deploy/chart/signet", "the chart's folder")
	namespace := flags.String("namespace", "signet-system", "of the release")
	values := map[string]any{}
	flags.Func("values", "a FILE with values, as a later -set would say them", func(path string) error {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		more, err := common.ReadValues(data)
		values = util.CoalesceTables(more, values)
		return err
	})
	flags.Func("set", "KEY=VALUE, like Helm's; may be given more than once", func(s string) error { return strvals.ParseInto(s, values) })
	if err := flags.Parse(args); err != nil {
		return err
	}
	files, _, err := render(*dir, *namespace, values, false)
	if err != nil {
		return err
	}
	_, err = io.WriteString(stdout, text(files))
	return err
}

// text is what kubectl reads.
func text(files []file) string {
	var b strings.Builder
	for _, f := range files {
		fmt.Fprintf(&b, "---\n%s\n", strings.TrimPrefix(strings.Trim(f.text, "\n"), "---\n"))
	}
	return b.String()
}

// file is what one template yields.
type file struct{ name, text string }

// rank says which templates' objects come before those of others, since these need them.
func (f file) rank() int {
	switch f.name {
	case "namespace.yaml":
		return 0
	case "csidriver.yaml":
		return 2
	case "ca.yaml":
		return 3
	case "agent.yaml":
		return 4
	}
	return 1
}

// hookMark is in every object of a template of hooks: objects that Helm makes at some moment, and nobody else ever.
const hookMark = "helm.sh/hook:"

// render returns what the chart yields with values, in the order to apply it in, without what is empty, and Helm's hooks
// apart. Unchecked leaves the values' schema out, for marks in the place of values.
func render(dir, namespace string, values map[string]any, unchecked bool) (files, hooks []file, err error) {
	c, err := loader.LoadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	version, err := common.ParseKubeVersion(kubeVersion)
	if err != nil {
		return nil, nil, err
	}
	caps := common.DefaultCapabilities.Copy()
	caps.KubeVersion = *version
	release := common.ReleaseOptions{Name: "signet", Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValuesWithSchemaValidation(c, values, release, caps, unchecked)
	if err != nil {
		return nil, nil, err
	}
	texts, err := engine.Render(c, all)
	if err != nil {
		return nil, nil, err
	}
	for name, text := range texts {
		switch base := path.Base(name); {
		case !strings.HasSuffix(base, ".yaml") || strings.TrimSpace(text) == "":
		case strings.Contains(text, hookMark):
			hooks = append(hooks, file{base, text})
		default:
			files = append(files, file{base, text})
		}
	}
	slices.SortFunc(files, func(a, b file) int {
		return cmp.Or(a.rank()-b.rank(), strings.Compare(a.name, b.name))
	})
	return files, hooks, nil
}
