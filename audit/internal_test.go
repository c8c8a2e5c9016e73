package audit

import "time"

// KeepBookEvery changes after how many entries the book beside a record is
// renewed, and kept at the end.
func KeepBookEvery(every, last uint64) (undo func()) {
	e, l := bookEvery, lastBook
	bookEvery, lastBook = every, last
	return func() { bookEvery, lastBook = e, l }
}

// AnchorPatience changes for how long nothing is refused while the anchor does not answer.
func AnchorPatience(d time.Duration) (undo func()) {
	old := anchorPatience
	anchorPatience = d
	return func() { anchorPatience = old }
}
