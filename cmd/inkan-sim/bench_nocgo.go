//go:build !cgo

package main

import "context"

// token measures nothing without cgo: PKCS#11 needs it.
func (b *bench) token(context.Context) error {
	b.notes = append(b.notes, "Built without cgo: SoftHSM was not measured.")
	return nil
}

func (b *bench) slowToken(context.Context) error { return nil }
