//go:build !cgo

package hsm

import "os"

const supported = false

// RunWorker returns ErrUnsupported: this binary was built without cgo.
func RunWorker(*os.File) error { return ErrUnsupported }
