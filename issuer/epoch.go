package issuer

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"inkan/attest"
)

// maxEpochStep is how far a demanded epoch may be ahead of the one that the
// device had: a host increments no further at a time.
const maxEpochStep = 64

// setEpoch demands an epoch of a device, from its next enrolment or renewal on.
// It does not go back, and it is not demanded before there is an approval that
// lasts so long: else no key on the host would work.
func (s *store) setEpoch(ctx context.Context, id string, n uint64, now time.Time) error {
	policies, err := s.policiesFor(ctx, id)
	if err != nil {
		return err
	}
	usable := 0
	for _, p := range policies {
		if p.Epoch >= n {
			usable++
		}
	}
	return s.inTx(ctx, func(tx *sql.Tx) error {
		var least, last uint64
		err := tx.QueryRowContext(ctx, "SELECT epoch_min, epoch FROM device WHERE id = ?", id).Scan(&least, &last)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return fmt.Errorf("device %.80q: %w", id, ErrNotFound)
		case err != nil:
			return err
		case n == 0 || n > attest.MaxEpoch:
			return fmt.Errorf("device %s: epoch %d: %w: 1 or more is expected", id, n, ErrInvalid)
		case n < least || n < last:
			return fmt.Errorf("device %s: epoch %d: %w: %d is demanded and the counter had %d: epochs do not go back", id, n, ErrInvalid, least, last)
		case last > 0 && n-last > maxEpochStep:
			return fmt.Errorf("device %s: epoch %d: %w: the counter had %d, at most %d more are possible at a time", id, n, ErrInvalid, last, maxEpochStep)
		case usable == 0:
			return fmt.Errorf("device %s: epoch %d: %w: no approval for it is in force, so no key on the host would work: inkan issuer policy approve --device %s --epoch %d", id, n, ErrInvalid, id, n)
		}
		if _, err := tx.ExecContext(ctx, "UPDATE device SET epoch_min = ? WHERE id = ?", int64(n), id); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Device: id, Detail: fmt.Sprintf("epoch %d is demanded", n)})
	})
}
