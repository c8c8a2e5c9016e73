//go:build !cgo

package main

import "context"

// token measures nothing without cgo: PKCS#11 needs it.
func (b *bench) token(context.Context, string) error {
	b.notes = append(b.notes, "Built without cgo: SoftHSM was not measured.")
	return nil
}
