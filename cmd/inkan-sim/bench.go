package main

import (
	"context"
	"errors"
	"io"
	"time"
)

func runBench(ctx context.Context, out io.Writer, inkan string, d time.Duration, asJSON bool) error {
	return errors.ErrUnsupported
}
