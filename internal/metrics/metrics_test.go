package metrics

import (
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestGroup(t *testing.T) {
	one := prometheus.NewCounter(prometheus.CounterOpts{Name: "one", Help: "One."})
	two := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "two", Help: "Two."}, []string{"of"})
	three := prometheus.NewGauge(prometheus.GaugeOpts{Name: "three", Help: "Three."})
	two.WithLabelValues("a").Set(1)
	two.WithLabelValues("b").Set(2)
	all := Group{Group{one, two}, Group{}, three} // a group is a collector, so groups may be grouped
	reg := prometheus.NewPedanticRegistry()       // what is collected must have been described
	if err := reg.Register(all); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		for range f.GetMetric() {
			got = append(got, f.GetName())
		}
	}
	if want := []string{"one", "three", "two", "two"}; !slices.Equal(got, want) {
		t.Errorf("gathered %q, want %q", got, want)
	}
	if err := reg.Register(Group{three}); err == nil {
		t.Error("a metric was registered twice: it was not described")
	}
	if !reg.Unregister(all) {
		t.Error("what was registered is not known")
	}
}
