//go:build wycheproof_linked

package wycheproof

import _ "github.com/c2sp/wycheproof" // keeps the module among the requirements; nothing sets this tag
