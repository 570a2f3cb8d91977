//go:build cluster && linux

package nodes_test

import (
	"os"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

func TestMain(m *testing.M) { os.Exit(nodes.Main(m)) }
