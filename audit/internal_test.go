package audit

// KeepBookEvery changes after how many entries the book beside a record is
// renewed, and kept at the end.
func KeepBookEvery(every, last uint64) (undo func()) {
	e, l := bookEvery, lastBook
	bookEvery, lastBook = every, last
	return func() { bookEvery, lastBook = e, l }
}
