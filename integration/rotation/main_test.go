//go:build integration

package rotation

import (
	"flag"
	"os"
	"testing"
)

// TestMain lets the tests run side by side, however few processors there are: they wait for SVIDs to expire, most of the time.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
